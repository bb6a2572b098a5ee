"""``longspan load`` on the real server with the real default model."""

import csv
import json

from typer.testing import CliRunner

from loadtest.cli.application import application
from loadtest.load import result
from loadtest.measuring.listening import processes_on

TALKS = [
    (
        "What is a KV cache, and why does it grow?",
        "It keeps keys and values of all earlier tokens, one each.",
    ),
    ("Grüße aus Zürich! Wie geht es dir heute? 🙂", "Danke, es geht mir gut. Und wie geht es dir?"),
    ("Name four rivers of Asia, please.", "The Yangtze, the Mekong, the Ganges and the Indus."),
]


def test_a_sharegpt_file_is_measured_by_the_servers_own_tokens(server, tmp_path):
    file = tmp_path / "share.json"
    turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in TALKS]
    file.write_text(json.dumps([{"conversations": each} for each in turns]))
    command = [
        *("load", "--host", server.host, "--port", server.port, "--metrics-port", server.metrics_port),
        *("--workload", file, "--requests", 3, "--concurrency", "2,1", "--warmup", 0, "--seed", 5),
        *("--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv"),
    ]
    done = CliRunner().invoke(application, [str(word) for word in command])
    assert done.exit_code in (0, 1), done.output  # other work on the machine may make the runs invalid
    with server.client() as client:
        lengths = sorted(
            (
                client.count_tokens(question).token_count,
                len(client.tokenize(answer, special_tokens=False).token_ids),
            )
            for question, answer in TALKS
        )
    found = result.load(tmp_path / "r.json")
    assert [run.load_label for run in found.runs] == ["2 users", "1 user"]
    for run in found.runs:
        assert sorted((each["prompt_tokens"], each["output_tokens"]) for each in run.requests) == lengths
        assert run.summary.failed == {}
        assert run.summary.ttft.weak == ["p50", "p90", "p95", "p99"]
        assert run.server.output_tokens == sum(output for _, output in lengths)
        assert not [line for line in run.disagreements if "counted" in line]
        assert run.weather is not None
        assert 0 <= run.weather.foreign <= 1
    assert "3 requests is their largest" in done.stdout
    with (tmp_path / "r.csv").open(newline="") as rows:
        assert len(list(csv.DictReader(rows))) == 6
    assert server.process.pid in processes_on(server.port)


def test_prompts_are_new_each_time_unless_the_seed_is_given(server):
    def told(*more):
        command = [
            *("load", "--host", server.host, "--port", server.port, "--no-metrics", "--requests", 1),
            *("--concurrency", 1, "--warmup", 0, "--prompt-tokens", 64, "--output-tokens", 2, *more),
        ]
        return CliRunner().invoke(application, [str(word) for word in command]).stdout

    warning = "though no two prompts of this workload share a beginning"
    assert warning not in told()
    assert warning not in told()
    assert warning not in told("--seed", 77)
    again = told("--seed", 77)
    assert warning in again
    assert "an earlier run with seed 77; leave out --seed" in again
