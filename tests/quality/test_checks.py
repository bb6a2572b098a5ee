"""What becomes of figures: run, judged, printed."""

import io
import json
import sys
from contextlib import contextmanager
from functools import partial

import pytest
from rich.console import Console

from loadtest.deployment import FULL, Deployment, window
from loadtest.quality import __main__ as command
from loadtest.quality import checks, measurement, report
from loadtest.quality.deployments import covering
from loadtest.quality.measurement import Check, Measurement, MeasurementError
from loadtest.quality.types import DecodeTime, Needle, Outcome, Perplexity
from tests.scripted import serving

LONG = "\n".join(["So it goes on and on."] * 4000)


def filled(check, *results):
    """The check, with results as if it had been run."""
    for made, result in zip(check.measurements, results, strict=True):
        made._measure = lambda client, result=result: result
        made.run(None)
    return [outcome.passed for outcome in check.outcomes()]


def perplexity(value):
    return Perplexity(1024, 3072, value)


@pytest.mark.parametrize(
    ("full", "sinks", "bare", "passed"),
    [
        (20, 21, 40, [True, True]),
        (20, 22.1, 40, [False, True]),
        (20, 19.9, 40, [False, True]),
        (20, 21, 29, [True, False]),
        (20, float("nan"), float("nan"), [False, False]),
    ],
)
def test_sinks(full, sinks, bare, passed):
    assert filled(checks.sinks(LONG, 1), *map(perplexity, (full, sinks, bare))) == passed


@pytest.mark.parametrize(
    ("window", "held", "passed"),
    [(17, 66, [True, True]), (17.1, 66, [False, True]), (17, 67, [True, False]), (17, 0, [True, False])],
)
def test_beyond_training(window, held, passed):
    assert filled(checks.beyond_training(LONG), perplexity(20), perplexity(window), (held, 16)) == passed


def needles(*found, tokens=2000):
    depths = (0.98, 0.98, 0.5, 0.5, 0.1, 0.1)
    return [
        Needle(depth, "7291834", "7291834" if yes else "none", tokens)
        for depth, yes in zip(depths, found, strict=True)
    ]


@pytest.mark.parametrize(
    ("full", "window", "passed"),
    [
        ((1, 1, 1, 1, 1, 1), (1, 1, 0, 0, 0, 0), [True, True]),
        ((1, 1, 1, 1, 1, 0), (1, 1, 0, 0, 0, 0), [False, True]),
        ((1, 1, 1, 1, 1, 1), (1, 0, 0, 0, 0, 0), [True, False]),
        ((1, 1, 1, 1, 1, 1), (1, 1, 0, 0, 0, 1), [True, False]),
        ((1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0), [True, False]),
    ],
)
def test_needles_in_noise(full, window, passed):
    assert filled(checks.needles_in_noise(2), needles(*full), needles(*window)) == passed


@pytest.mark.parametrize(
    ("full", "topk", "window", "passed"),
    [
        ((1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 0), (1, 1, 0, 0, 0, 0), [True, True, True]),
        ((1, 1, 1, 1, 0, 1), (1, 1, 1, 0, 1, 0), (1, 1, 1, 0, 0, 0), [False, False, False]),
    ],
)
def test_needles_in_prose(full, topk, window, passed):
    assert (
        filled(checks.needles_in_prose(LONG), *(needles(*found) for found in (full, topk, window))) == passed
    )


def test_coverage():
    check = checks.coverage(LONG)
    others = [[5] * 64] * (len(check.measurements) - 2)
    assert filled(check, [5] * 64, *others, [5] * 63 + [6]) == [True] * len(others) + [False]


@pytest.mark.parametrize(
    ("full", "window", "passed"),
    [(1.2, 1.1, [True, True]), (1.19, 1.11, [False, False]), (1.3, 0.89, [True, False])],
)
def test_decode_time(full, window, passed):
    times = [[DecodeTime(1024, 0.05), DecodeTime(8064, 0.05 * growth)] for growth in (full, window)]
    assert filled(checks.decode_time(LONG), *times) == passed


def test_deployments_are_told_apart():
    deployments = covering(256)
    assert len({deployment.name for deployment in deployments}) == len(deployments)
    assert len({*deployments, *covering(256), FULL}) == len(deployments) + 1
    assert window(512, 4).arguments == [
        *("--attention", "sliding_window"),
        *("--attention-option", "window=512", "--attention-option", "sinks=4"),
    ]


@pytest.fixture
def scripted(monkeypatch):
    """Stands in for real servers; notes what was started."""
    started = []

    @contextmanager
    def serve(*arguments):
        if "broken" in arguments:
            raise measurement.NotStartedError("longspan serve did not start: INFO loading\nno such thing")
        started.append(arguments)
        with serving() as server:
            server.host = "127.0.0.1"
            yield server

    monkeypatch.setattr(measurement, "serve", serve)
    return started


def check_of(number, *measurements):
    def judge(made):
        return Outcome(number, "it", str(made.result), "a figure", True)

    return Check(number, "it", measurements, [partial(judge, made) for made in measurements])


def test_each_server_is_started_once(scripted):
    def ask(prompt):
        return lambda client: client.generate(prompt).text

    other = Deployment("other", "sparse", {"pattern": "x"}, ("--page-size", "8"))
    checked = [
        check_of(1, Measurement(FULL, ask("abc")), Measurement(other, ask("def"))),
        check_of(2, Measurement(other, ask("ghi"))),
        check_of(3, Measurement(Deployment("full"), ask("jkl"))),
    ]
    told = []
    outcomes = measurement.run(checked, ["--threads", "1"], told.append)
    assert [(outcome.test, outcome.measured) for outcome in outcomes] == [
        (1, "cba"),
        (1, "fed"),
        (2, "ihg"),
        (3, "lkj"),
    ]
    assert told == ["full", "other"]
    sparse = ("--attention", "sparse", "--attention-option", "pattern=x", "--page-size", "8")
    assert scripted == [("--threads", "1", "--attention", "full"), ("--threads", "1", *sparse)]


def test_what_cannot_be_measured_fails_alone(scripted):
    def refused(client):
        client.generate("!invalid")

    checked = [
        check_of(1, Measurement(Deployment("odd", "broken"), refused)),
        check_of(2, Measurement(FULL, refused)),
        check_of(3, Measurement(FULL, lambda client: "fine")),
    ]
    outcomes = measurement.run(checked, [], lambda name: None)
    assert [outcome.passed for outcome in outcomes] == [False, False, True]
    assert outcomes[0].measured == "odd: no such thing"
    assert "full: the request has 2 mistakes" in outcomes[1].measured
    with pytest.raises(MeasurementError, match="full: it has not been measured"):
        _ = Measurement(FULL, refused).result


OUTCOMES = [Outcome(1, "figure", "5", "6", False), Outcome(1, "other", "6", "6", True)]


def test_the_table_says_what_failed():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table(OUTCOMES))
    lines = console.export_text().splitlines()
    assert [line for line in lines if "figure" in line and "FAIL" in line]
    assert [line for line in lines if "other" in line and "pass" in line]


@pytest.mark.parametrize("passed", [True, False])
def test_the_command(monkeypatch, tmp_path, capsys, passed):
    asked = []

    def run(checked, arguments, tell):
        asked.append(([check.test for check in checked], arguments))
        return OUTCOMES[1:] if passed else OUTCOMES

    monkeypatch.setattr(command, "run", run)
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text(LONG)
    arguments = [
        "--test",
        "6",
        "--test",
        "1",
        "--text",
        str(text),
        "--json",
        str(out),
        "--",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    assert command.main() == (0 if passed else 1)
    assert asked == [([1, 6], ["--threads", "1"])]
    assert [entry["passed"] for entry in json.loads(out.read_text())] == ([True] if passed else [False, True])
    assert "other" in capsys.readouterr().out


def test_the_command_needs_a_text(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["quality", "--text", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "No such file" in capsys.readouterr().err
