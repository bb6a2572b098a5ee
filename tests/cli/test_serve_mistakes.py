"""``longspan serve``: mistakes give sentences, all at once, and flags of other servers are translated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.cli.other_servers import HERE
from server.settings import Settings
from tests.cli.serving import Outcome, clean

__all__ = ["clean"]


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--port", "70000"], {}, "--port: should be less than or equal to 65535, not '70000'."),
        (
            ["--dtype", "int3"],
            {},
            "--dtype: should be 'auto', 'float32', 'bfloat16' or 'float16', not 'int3'",
        ),
        (
            ["--rope-scaling", "ntk"],
            {},
            "--rope-scaling: should be 'default', 'linear', 'dynamic', 'yarn', 'llama3' or 'longrope', not",
        ),
        (["--rope-option", "factor"], {}, "--rope-option: 'factor' is not of the form KEY=VALUE"),
        (["--kv-memory", "many"], {}, "--kv-memory: 'many' is not an amount of memory; write it like 2GiB"),
        (["--attention-option", "window"], {}, "--attention-option: 'window' is not of the form KEY=VALUE"),
        (
            [],
            {"LONGSPAN_PORT": "tcp://1.1:5"},
            "$LONGSPAN_PORT: should be a valid integer, not 'tcp://1.1:5'",
        ),
        ([], {"LONGSPAN_METRICS": "maybe"}, "$LONGSPAN_METRICS: should be true or false, not 'maybe'."),
        ([], {"LONGSPAN_ATTENTION_OPTION": "window=5"}, "in the environment are JSON"),
        ([], {"LONGSPAN_CONFIG": "gone.toml"}, "$LONGSPAN_CONFIG: there is no file gone.toml."),
        (["--config", "gone.toml"], {}, "--config: there is no file gone.toml."),
        (["--config", "bad.toml"], {}, "bad.toml is not valid TOML"),
        (["--config", "typo.toml"], {}, "typo.toml: there is no setting 'prot'; did you mean 'port'?"),
        (["--config", "typo.toml"], {}, "typo.toml: max_n: should be greater than or equal to 1, not 0."),
        (["--prot", "1"], {}, "No such option: --prot"),
        (["extra"], {}, "extra"),
    ],
)
def test_mistakes_are_sentences(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    (tmp_path / "bad.toml").write_text("port: 5\n")
    (tmp_path / "typo.toml").write_text("prot = 5\nmax_n = 0\n")
    outcome = Outcome(arguments, environment)
    assert outcome.settings is None
    assert outcome.code == 2
    assert sentence in outcome.error
    assert "Traceback" not in outcome.error
    assert "https://" not in outcome.error


def test_all_mistakes_are_told_at_once() -> None:
    outcome = Outcome(["--port", "x", "--max-n", "0"], {"LONGSPAN_PAGE_SIZE": "0"})
    sources = {tuple(line.split(": ")[:2]) for line in outcome.error.splitlines()}
    assert sources == {("longspan", name) for name in ("--port", "--max-n", "$LONGSPAN_PAGE_SIZE")}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-model-len", "4096"], "--max-model-len: here it is called --max-context."),
        (["--port", "0", "--gpu-memory-utilization=0.9"], "here it is called --kv-memory-share, a share of"),
        (["--api-key", "x"], "--api-key: here it is called --identities, a file with hashes of tokens"),
        (["--ssl-keyfile", "k.pem"], "--ssl-keyfile: here it is called --tls-key."),
        (["--max-num-seqs", "8"], "--max-num-seqs: here it is called --max-running."),
        (["--max-running-requests", "8"], "--max-running-requests: here it is called --max-running."),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype: here it is called --kv-dtype."),
        (["--context-length", "8192"], "--context-length: here it is called --max-context."),
        (["--mem-fraction-static", "0.8"], "--mem-fraction-static: here it is called --kv-memory-share"),
        (["-m", "x.gguf"], "-m: here it is called --model."),
        (["-ngl", "99"], "-ngl: there is none here, because a model is on one device"),
        (["--trust-remote-code"], "--trust-remote-code: there is none here, because no code of a model is"),
        (["--tp", "2"], "--tp: Longspan serves a model on one device; leave it out."),
        (
            ["org/model"],
            "'org/model' belongs to no flag. A model is named with a flag here: --model org/model.",
        ),
    ],
)
def test_flags_of_other_servers_are_named_as_here(arguments: list[str], sentence: str) -> None:
    outcome = Outcome(arguments)
    assert (outcome.code, outcome.settings) == (2, None)
    assert sentence in outcome.error


def test_flags_of_other_servers_are_translated() -> None:
    """Every name that the sentences give is one of the flags here, and none that they translate is."""
    flags = set(re.findall(r"--[a-z-]+", Outcome(["--help"]).output))
    for foreign, here in HERE.items():
        assert foreign not in flags
        assert set(re.findall(r"--[a-z-]+", here)) <= flags, foreign


def test_a_variable_that_is_nearly_one_of_a_setting_is_refused() -> None:
    outcome = Outcome([], {"LONGSPAN_MAX_CONTEX": "5", "LONGSPAN_KVMEMORY": "1GiB"})
    assert (outcome.code, outcome.settings) == (2, None)
    assert outcome.error.splitlines() == [
        "longspan: $LONGSPAN_KVMEMORY: there is no such setting; did you mean $LONGSPAN_KV_MEMORY?",
        "longspan: $LONGSPAN_MAX_CONTEX: there is no such setting; did you mean $LONGSPAN_MAX_CONTEXT?",
    ]


def test_other_variables_are_warned_of_and_service_links_passed_over() -> None:
    links = {
        "LONGSPAN_SERVICE_HOST": "10.0.0.1",
        "LONGSPAN_SERVICE_PORT": "50051",
        "LONGSPAN_SERVICE_PORT_GRPC": "50051",
        "LONGSPAN_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "LONGSPAN_PORT_50051_TCP_PROTO": "tcp",
        "LONGSPAN_CHAT_PORT": "tcp://10.0.0.1:50051",
        "LONGSPAN_CHAT_SERVICE_HOST": "10.0.0.1",
    }
    outcome = Outcome([], {**links, "LONGSPAN_API_KEY": "secret"})
    assert outcome.settings == Settings()
    assert outcome.error == "longspan: $LONGSPAN_API_KEY is no setting of the server and has no effect\n"
