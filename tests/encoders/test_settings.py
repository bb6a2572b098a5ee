"""Every setting counts for an encoder, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.engine.encoder_build import build_encoder
from server.errors import RefusedError
from server.network_settings import NetworkSettings
from server.ray_settings import RaySettings
from server.settings import Settings

# Of the model and the engine, those that an encoder reads.
_READ = {"device", "dtype", "max_context", "max_batch_tokens", "max_running", "threads"}
# Of the server process, for every model.
_SHARED = {
    *(NetworkSettings.model_fields.keys() - {"prefix_sharing"}),
    *RaySettings.model_fields,
    *("model", "model_name", "allow_pickle", "max_queue", "max_request_bytes", "cache_dir"),
    *("on_engine_failure", "engine_step_timeout", "engine_load_timeout"),
    *("restart_limit", "restart_window_seconds", "restart_backoff_seconds"),
    *("drain_seconds", "end_with_stdin"),
    *("log_level", "log_format", "log_texts", "otlp_endpoint"),
    "check_integrity",  # holds of the allocator that an encoder has not; test servers always ask for it
}
_REFUSED: dict[str, Any] = {
    "attention": "sliding_window",
    "attention_option": {"window": "5"},
    "kernel": "sdpa",
    "native_level": "portable",
    "kv_dtype": "float32",
    "page_size": 8,
    "kv_memory": "1GiB",
    "kv_memory_share": 0.1,
    "prefix_cache": False,
    "prefix_sharing": "all",
    "speculate": "ngram",
    "draft_tokens": 5,
    "draft_model": "student",
    "draft_attention": "sparse",
    "draft_attention_option": {"window": "5"},
    "prompt_step_ms": 1,
    "max_prefills": 1,
    "priority_aging_seconds": 1,
    "max_n": 1,
    "max_logprobs": 1,
    "max_stop_strings": 1,
    "cuda_graphs": False,
    "measure_device": True,
    "chat_template": "x",
    "weights": "int8",
    "generation_config": "none",
    "rope_scaling": "default",
    "rope_option": {"factor": "2"},
}


def test_every_setting_is_read_shared_or_refused() -> None:
    assert _READ | _SHARED | _REFUSED.keys() == Settings.model_fields.keys()
    assert not _READ & _SHARED
    assert not (_READ | _SHARED) & _REFUSED.keys()


@pytest.mark.parametrize("name", _REFUSED)
def test_a_setting_of_decoders_is_refused_by_its_flag(name: str) -> None:
    settings = Settings(device="cpu", **{name: _REFUSED[name]})
    flag = f"--{'no-' if _REFUSED[name] is False else ''}{name.replace('_', '-')}"
    with pytest.raises(RefusedError, match=f"^{flag}: for models that generate text"):
        build_encoder(settings, Path("nowhere"), lambda stage, fraction: None)
