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

from server.setting_types import Bytes, File, Options


class Settings(BaseSettings):
    """Settings of one server. Field order is the order of ``longspan serve --help``."""

    model_config = SettingsConfigDict(env_prefix="LONGSPAN_", extra="forbid", frozen=True)

    model: str | None = Field(
        None,
        description="Local Hugging Face folder, hub name, GGUF file, or minilm, a small encoder. Without it: "
        "SmolLM2-135M-Instruct.",
    )
    model_name: str | None = Field(None, description="Name in requests and metrics. Without it: from MODEL.")
    chat_template: str | None = Field(
        None,
        description="Name of one of the model's chat templates, or a Jinja file. Without it: its default.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the model. auto: float32 on CPU, the checkpoint's own elsewhere."
    )
    weights: Literal["auto", "float", "int8", "int4", "fp8"] = Field(
        "auto",
        description="Form of the linear layers' weights. float: exact. On CPU int8, int4: faster, with "
        "activations rounded to 8 bits. On CUDA int8, or fp8, less exact: half the bytes, by "
        "torchao. auto: on CPU int4 or int8 for each layer whose weights they hold exactly, as many GGUF "
        "files', else float.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is one.")
    max_context: int | None = Field(
        None,
        ge=2,
        le=2**31 - 1,
        description="Most tokens of prompt and output together. Without it: the model's own.",
    )

    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="Where a request leaves sampling unset. auto: as the model's generation_config.json has "
        "it; none: temperature 1, all tokens, no penalties.",
    )

    rope_scaling: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] | None = Field(
        None,
        description="How rotary positions are stretched; default: not at all. Without it: as the model says.",
    )
    rope_option: Options = Field(
        default_factory=dict, description="Detail of --rope-scaling, like factor=4; may be repeated."
    )

    host: str = Field("127.0.0.1", description="Address of the gRPC service.")
    port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC service; 0 picks a free one.")
    metrics_host: str = Field("127.0.0.1", description="Address of /metrics.")
    metrics_port: int = Field(9464, ge=0, le=65535, description="Port of /metrics; 0 picks a free one.")

    metrics: bool = Field(True, description="Serve /metrics.")
    metrics_tls: bool = Field(False, description="Serve /metrics by TLS, too, with the same certificate.")
    metrics_auth: bool = Field(
        False,
        description="Show /metrics only for the token of an identity that may read it, as bearer token, or "
        "password of basic authentication with the identity as user.",
    )

    tls_certificate: File = Field(
        None,
        description="Serve gRPC by TLS: PEM file of the certificate and those between it and its root.",
    )
    tls_key: File = Field(None, description="PEM file of the certificate's private key.")
    tls_client_ca: File = Field(
        None,
        description="PEM file of root certificates: only clients that show a certificate from one of these "
        "are served (mutual TLS).",
    )
    identities: File = Field(
        None,
        description="TOML file of who may ask: hashes of tokens, names in certificates, limits; read again "
        "when it changes. longspan token writes it.",
    )
    prefix_sharing: Literal["identity", "all"] = Field(
        "identity",
        description="Whose prompts the prefix cache finds: those of the same identity, or of all. all lets "
        "one find out whether another's prompt began alike.",
    )
    reflection: bool = Field(True, description="Describe the services to clients that ask (reflection).")
    server_info: bool = Field(True, description="Answer GetServerInfo: settings, versions and load.")
    abort: bool = Field(True, description="Let clients end their requests by name (Abort).")
    insecure: bool = Field(
        False,
        description="Let other machines reach the gRPC service without TLS, or without tokens or "
        "certificates of clients; for a network where something else protects it.",
    )

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
