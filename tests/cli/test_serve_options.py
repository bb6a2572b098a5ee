"""``longspan serve``: flags, environment and file give one Settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.cli.options import flag, variable
from server.settings import Settings
from tests.cli.serving import Outcome, clean

__all__ = ["clean"]

# A value of each setting that is not its default: as text, and as Settings must hold it.
VALUES: dict[str, tuple[str, Any]] = {
    "model": ("folder", "folder"),
    "model_name": ("mine", "mine"),
    "chat_template": ("mine.jinja", "mine.jinja"),
    "dtype": ("bfloat16", "bfloat16"),
    "weights": ("int4", "int4"),
    "device": ("cpu", "cpu"),
    "max_context": ("1024", 1024),
    "generation_config": ("none", "none"),
    "rope_scaling": ("yarn", "yarn"),
    "rope_option": ("factor=4", {"factor": "4"}),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "max_connections": ("100", 100),
    "max_streams_per_connection": ("10", 10),
    "connection_idle_seconds": ("60", 60.0),
    "connection_age_seconds": ("300", 300.0),
    "connection_grace_seconds": ("0.5", 0.5),
    "metrics_host": ("::1", "::1"),
    "metrics_port": ("9000", 9000),
    "metrics": ("false", False),
    "metrics_tls": ("true", True),
    "metrics_auth": ("true", True),
    "tls_certificate": ("c.pem", Path("c.pem")),
    "tls_key": ("c.key", Path("c.key")),
    "tls_client_ca": ("root.pem", Path("root.pem")),
    "identities": ("identities.toml", Path("identities.toml")),
    "prefix_sharing": ("all", "all"),
    "protocols": ("kserve, vllm", "kserve,vllm"),
    "reflection": ("false", False),
    "server_info": ("false", False),
    "abort": ("false", False),
    "load_reports": ("true", True),
    "kv_events": ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5557"),
    "kv_events_replay": ("tcp://127.0.0.1:5558", "tcp://127.0.0.1:5558"),
    "insecure": ("true", True),
    "ray": ("true", True),
    "ray_replicas": ("2", 2),
    "ray_max_replicas": ("4", 4),
    "ray_target_requests": ("2.5", 2.5),
    "ray_scale_up_seconds": ("5", 5.0),
    "ray_scale_down_seconds": ("60", 60.0),
    "ray_model": ("small=folder", {"small": "folder"}),
    "ray_loaded_models": ("2", 2),
    "allow_pickle": ("true", True),
    "log_texts": ("true", True),
    "attention": ("sparse", "sparse"),
    "attention_option": ("window=512", {"window": "512"}),
    "kernel": ("sdpa", "sdpa"),
    "native_level": ("portable", "portable"),
    "kv_dtype": ("bfloat16", "bfloat16"),
    "page_size": ("32", 32),
    "kv_memory": ("1.5GiB", 3 << 29),
    "kv_memory_share": ("0.25", 0.25),
    "speculate": ("ngram", "ngram"),
    "draft_tokens": ("5", 5),
    "draft_model": ("student", "student"),
    "draft_attention": ("sparse", "sparse"),
    "draft_attention_option": ("window=5", {"window": "5"}),
    "prompt_step_ms": ("20", 20.0),
    "max_prefills": ("2", 2),
    "priority_aging_seconds": ("5", 5.0),
    "prefix_cache": ("false", False),
    "measure_device": ("true", True),
    "cuda_graphs": ("false", False),
    "max_batch_tokens": ("64", 64),
    "max_running": ("3", 3),
    "max_queue": ("0", 0),
    "max_n": ("1", 1),
    "max_logprobs": ("0", 0),
    "max_stop_strings": ("2", 2),
    "max_request_bytes": ("1MiB", 1 << 20),
    "threads": ("1", 1),
    "on_engine_failure": ("restart", "restart"),
    "engine_step_timeout": ("30", 30.0),
    "engine_load_timeout": ("90", 90.0),
    "restart_limit": ("2", 2),
    "restart_window_seconds": ("60", 60.0),
    "restart_backoff_seconds": ("0.1", 0.1),
    "drain_seconds": ("0.5", 0.5),
    "end_with_stdin": ("true", True),
    "cache_dir": ("/var/cache/x", Path("/var/cache/x")),
    "check_integrity": ("true", True),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "otlp_endpoint": ("http://127.0.0.1:4317", "http://127.0.0.1:4317"),
}
# Those whose flag takes no value, or may be repeated, are not of the plain form --NAME VALUE.
OTHERS = (
    "attention_option",
    "draft_attention_option",
    "rope_option",
    "ray",
    "ray_model",
    "prefix_cache",
    "measure_device",
    "cuda_graphs",
    "check_integrity",
    "end_with_stdin",
    *(
        "metrics",
        "metrics_tls",
        "metrics_auth",
        "reflection",
        "server_info",
        "abort",
        "load_reports",
        "insecure",
    ),
    *("allow_pickle", "log_texts"),
)
PLAIN = [name for name in Settings.model_fields if name not in OTHERS]


def value(name: str) -> tuple[str, Any]:
    assert name in VALUES, f"a new setting: give {name} a value in VALUES"
    return VALUES[name]


def test_without_flags_the_defaults_apply() -> None:
    outcome = Outcome([])
    assert outcome.settings == Settings()
    assert outcome.code == 7


@pytest.mark.parametrize("name", PLAIN)
def test_every_setting_is_a_flag_and_a_variable(name: str) -> None:
    text, expected = value(name)
    for outcome in (Outcome([flag(name), text]), Outcome([], {variable(name): text})):
        assert outcome.settings is not None, outcome.error
        assert outcome.settings == Settings().model_copy(update={name: expected})


def test_flags_of_other_forms() -> None:
    outcome = Outcome(
        [
            "--measure-device",
            "--no-prefix-cache",
            "--attention-option",
            "window=512",
            "--attention-option",
            "sinks=a=b",
        ]
    )
    assert outcome.settings is not None, outcome.error
    assert outcome.settings.prefix_cache is False
    assert outcome.settings.measure_device is True
    assert outcome.settings.attention_option == {"window": "512", "sinks": "a=b"}
    outcome = Outcome(["--rope-option", "factor=4", "--rope-option", "long_factor=1,2"])
    assert outcome.settings is not None, outcome.error
    assert outcome.settings.rope_option == {"factor": "4", "long_factor": "1,2"}
    outcome = Outcome(
        ["--prefix-cache"],
        {"LONGSPAN_PREFIX_CACHE": "0", "LONGSPAN_ATTENTION_OPTION": '{"window": "512"}'},
    )
    assert outcome.settings is not None, outcome.error
    assert outcome.settings.prefix_cache is True
    assert outcome.settings.attention_option == {"window": "512"}
    flags = ["--no-metrics", "--metrics-tls", "--metrics-auth", "--no-reflection", "--no-server-info"]
    outcome = Outcome([*flags, "--no-abort", "--load-reports", "--insecure", "--allow-pickle", "--log-texts"])
    assert outcome.settings is not None, outcome.error
    chosen = {name: VALUES[name][1] for name in OTHERS[-10:]}
    assert outcome.settings == Settings().model_copy(update=chosen)
    for given in (Outcome(["--check-integrity"]), Outcome([], {"LONGSPAN_CHECK_INTEGRITY": "true"})):
        assert given.settings is not None, given.error
        assert given.settings.check_integrity is True


def test_precedence(tmp_path: Path) -> None:
    (tmp_path / "longspan.toml").write_text('port = 1\nhost = "a"\nmax_n = 1\n')
    other = tmp_path / "other.toml"
    other.write_text("port = 2\nmax_n = 2\n[attention_option]\nwindow = '64'\n")
    environment = {"LONGSPAN_PORT": "3", "LONGSPAN_HOST": "b"}
    outcome = Outcome(["--port", "4"], environment)
    assert outcome.settings is not None, outcome.error
    assert (outcome.settings.port, outcome.settings.host, outcome.settings.max_n) == (4, "b", 1)
    outcome = Outcome(["--config", str(other)], environment)
    assert outcome.settings is not None, outcome.error
    assert (outcome.settings.port, outcome.settings.host, outcome.settings.max_n) == (3, "b", 2)
    assert outcome.settings.attention_option == {"window": "64"}
    outcome = Outcome([], {"LONGSPAN_CONFIG": str(other)})
    assert outcome.settings is not None, outcome.error
    assert (outcome.settings.port, outcome.settings.host) == (2, "127.0.0.1")


def test_help_shows_every_setting_with_its_variable_and_default() -> None:
    outcome = Outcome(["--help"], {"COLUMNS": "80"})
    assert outcome.code == 0
    for name, field in Settings.model_fields.items():
        assert flag(name) in outcome.output
        assert variable(name) in outcome.output
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            assert str(field.default) in outcome.output
    assert "auto|float32|bfloat16|float16" in outcome.output


def test_every_setting_stands_under_a_title() -> None:
    outcome = Outcome(["--help"])
    titles = [line[:-1] for line in outcome.output.splitlines() if line and not line.startswith((" ", "Us"))]
    assert titles == [
        *("Options", "Model", "Network", "Access", "Ray Serve", "Attention", "Memory of the KV cache"),
        *("Speculation", "Limits", "Engine", "Observability"),
    ]
    before_model = outcome.output.split("\nModel:")[0]
    assert [name for name in Settings.model_fields if f"{flag(name)} " in before_model] == []
