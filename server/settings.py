"""Every setting of the server, once: name, type, default, help. Flags, environment and TOML come from here.

Order of precedence: command line, environment (``LONGSPAN_PORT=...``), TOML file, default. The file is
``--config FILE``, else ``$LONGSPAN_CONFIG``, else ``longspan.toml`` in the working directory, if there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from server.model_settings import ModelSettings
from server.network_settings import NetworkSettings
from server.ray_settings import RaySettings
from server.setting_types import Bytes, Options

DRAFT_ATTENTION = "sliding_window"
"""Backend that drafts, where ``--draft-attention`` does not say."""


class Settings(RaySettings, NetworkSettings, ModelSettings):
    """Settings of one server. Field order, that of ``ModelSettings`` first, is the order of the help."""

    model_config = SettingsConfigDict(env_prefix="LONGSPAN_", extra="forbid", frozen=True)

    attention: str = Field(
        "full", description="Attention backend, like full or sliding_window; longspan backends shows all."
    )
    attention_option: Options = Field(
        default_factory=dict,
        description="Detail of the backend, like window=512; may be repeated.",
    )
    kernel: str = Field("auto", description="Attention kernel: auto, or a name that longspan backends shows.")

    native_level: Literal[
        "auto",
        "portable",
        "x86-64-v3",
        "avx-vnni",
        "x86-64-v4",
        "avx512-vnni",
        "avx512-bf16",
        "amx-bf16",
        "armv8-dotprod",
    ] = Field(
        "auto",
        description="Instructions that the native code of a CPU may use. auto: the highest level that the "
        "processor can execute.",
    )

    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3"] = Field(
        "auto",
        description="Dtype of the KV cache. auto: float16 if a CPU's weights are packed, else the model's.",
    )
    page_size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Tokens per page of the KV cache. Without it: 16 on a CPU, 64 on a GPU.",
    )
    kv_memory: Bytes | None = Field(
        None, description="Memory of the KV cache, like 2GiB. Without it: --kv-memory-share."
    )
    kv_memory_share: float | None = Field(
        None,
        gt=0,
        le=0.95,
        description="Share of the memory free after loading that the KV cache may take. Without it: 0.3 on a "
        "CPU, 0.85 on a GPU.",
    )
    prefix_cache: bool = Field(True, description="Keep computed prompts for later requests that begin alike.")

    speculate: Literal["off", "ngram", "self", "draft"] = Field(
        "off",
        description="Guess tokens ahead and verify several in one step; no token changes. ngram: what "
        "followed the last tokens when they came before. self: the model with less attention. draft: a "
        "smaller model.",
    )
    draft_model: str | None = Field(
        None, description="With --speculate draft: the smaller model, as for --model, of the same vocabulary."
    )
    draft_attention: str | None = Field(
        None, description="With --speculate self: the attention that drafts. Without it: sliding_window."
    )
    draft_attention_option: Options = Field(
        default_factory=dict, description="Detail of that backend, like window=508; may be repeated."
    )
    draft_tokens: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Tokens guessed for a sequence in a step, at most; fewer where they are often wrong. "
        "Without it: 8, with self or draft 4.",
    )

    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens computed per engine step, at most. Without it: 512 on a CPU, 4096 on a GPU.",
    )
    prompt_step_ms: float = Field(
        40.0,
        ge=0,
        allow_inf_nan=False,
        description="How long the prompt tokens of a step take, about; prompts are cut accordingly. 0: any.",
    )
    max_prefills: int = Field(
        8, ge=1, description="Prompts of more than a step that are computed at a time, at most."
    )
    priority_aging_seconds: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds of waiting that raise a request's priority by one. 0: waiting raises none.",
    )
    max_running: int | None = Field(
        None,
        ge=1,
        description="Sequences worked on at once, at most. Without it: 64 on a CPU, 256 on a GPU.",
    )
    max_queue: int = Field(256, ge=0, description="Sequences waiting beyond those; more are turned away.")
    max_n: int = Field(16, ge=1, description="Most samples per request.")
    max_logprobs: int = Field(20, ge=0, description="Most log probabilities per position.")
    max_stop_strings: int = Field(16, ge=0, description="Most stop strings per request.")
    max_request_bytes: Bytes | None = Field(
        None,
        le=1 << 30,
        description="Largest request message, like 4MiB, and the largest text in one. Without it: what the "
        "context can hold of the vocabulary's longest token, 8 MiB at most.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of the engine, at most. Without it: all cores, or what a quota gives.",
    )

    on_engine_failure: Literal["exit", "restart"] = Field(
        "exit", description="When the engine process dies or hangs: exit with an error, or start it again."
    )
    engine_step_timeout: float = Field(
        120.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after which an engine that is still in the same step is taken for hung and "
        "killed; five times as long while a kernel is compiled. 0: never.",
    )
    engine_load_timeout: float = Field(
        1800.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after which an engine that is still in the same stage of loading is taken for "
        "hung and killed. 0: never.",
    )
    restart_limit: int = Field(
        5,
        ge=0,
        description="With --on-engine-failure restart: starts within the window, at most; then the server "
        "exits with an error.",
    )
    restart_window_seconds: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="Time of serving in which restarts are counted."
    )
    restart_backoff_seconds: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Wait before the second restart within the window; it doubles with each, up to a minute. "
        "The first comes at once.",
    )
    drain_seconds: float = Field(
        25.0,
        ge=0,
        description="After Ctrl-C, SIGTERM or SIGHUP: how long running requests may take to finish.",
    )
    end_with_stdin: bool = Field(
        False,
        description="End at once when standard input does, as it does when the program that holds its other "
        "end dies. For programs that start servers.",
    )
    cuda_graphs: bool = Field(
        True, description="On a GPU, capture decode steps at the start and replay them as one launch each."
    )
    cache_dir: Path = Field(
        Path("~/.cache/longspan"),
        description="Where converted models and compiled kernels are kept.",
        validate_default=True,
    )
    check_integrity: bool = Field(
        False,
        description="Check the KV allocator's bookkeeping after every step; the engine ends if it is wrong.",
    )

    measure_device: bool = Field(
        False,
        description="At start, measure the device's memory bandwidth and matrix rate, for /metrics and "
        "`longspan load`.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Logs as lines for people, or one JSON object per line."
    )
    log_texts: bool = Field(
        False, description="Log also what can quote requests: sentences that refuse them, messages of bugs."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Where to send OpenTelemetry traces, like http://127.0.0.1:4317. Needs the extra otel.",
    )

    @field_validator("cache_dir", "tls_certificate", "tls_key", "tls_client_ca", "identities")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags first, then the environment, then the TOML file that ``load`` chose."""
        file = os.environ.get("LONGSPAN_CONFIG") or "longspan.toml"
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file)
