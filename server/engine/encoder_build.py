"""From settings and a folder with an encoder to an engine that runs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from server.encoder_messages import EncoderInfo
from server.engine.cores import usable_cores
from server.engine.encoder_core import EncoderCore
from server.engine.freed_memory import keep_freed_memory
from server.engine.hardware import memory_bytes, used_bytes
from server.engine.prepare import Report, chosen_device
from server.engine.team import watched
from server.errors import RefusedError
from server.messages import Ready
from server.models.encoders.load import load_encoder
from server.settings import Settings
from server.sizes import Sizes

# Settings of what an encoder does not have: a KV cache, a choice of attention, packed weights, our native
# code, chats, prompts that are cut, outputs.
_OF_DECODERS = (
    *("attention", "attention_option", "kernel", "kv_dtype", "kv_memory", "kv_memory_share", "page_size"),
    *("prefix_cache", "prefix_sharing", "kv_events", "kv_events_replay"),
    *("native_level", "cuda_graphs", "measure_device"),
    *("weights", "rope_scaling", "rope_option", "chat_template", "generation_config"),
    *("speculate", "draft_tokens", "draft_model", "draft_attention", "draft_attention_option"),
    *("prompt_step_ms", "max_prefills", "priority_aging_seconds"),
    *("max_n", "max_logprobs", "max_stop_strings"),
)


def build_encoder(settings: Settings, folder: Path, report: Report) -> tuple[EncoderCore, Ready]:
    """Loads an encoder and proves it.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        report: told what is going on, with the share done.

    Raises:
        RefusedError: the model, the settings and the machine don't go together; the sentence says why.
    """
    device = chosen_device(settings)
    _refuse_settings(settings)
    if device == "cpu":
        keep_freed_memory()
    sizes = Sizes.of(settings, device)
    threads = settings.threads or usable_cores()
    torch.set_num_threads(threads)
    loaded = load_encoder(folder, settings.dtype, device, settings.max_context, report)
    core = EncoderCore(
        loaded.encoder,
        head=loaded.head,
        chances=loaded.chances,
        context_length=loaded.context_length,
        max_running=sizes.max_running,
        max_batch_tokens=sizes.max_batch_tokens,
        team=watched(threads) if device == "cpu" else None,
    )
    encoder, files = loaded.encoder, loaded.files
    place = encoder.device
    dtype = str(loaded.dtype).removeprefix("torch.")
    ready = Ready(
        architecture=loaded.architecture,
        parameters=loaded.parameters,
        layers=loaded.layers,
        vocabulary_size=loaded.vocabulary_size,
        context_length=loaded.context_length,
        dtype=dtype,
        weights=dtype,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        attention_backend=encoder.attention,
        attention_pattern=encoder.attention,
        attention_kernel=encoder.kernel,
        attention_reason=encoder.attention_reason,
        max_batch_tokens=sizes.max_batch_tokens,
        max_running=sizes.max_running,
        weight_bytes=loaded.weight_bytes,
        memory_total=memory_bytes(place),
        memory_used=used_bytes(place),
        threads=threads,
        executor=encoder.executor,
        executor_reason=f"{encoder.executor_reason}; {loaded.linears}",
        versions={"torch": str(torch.__version__), "transformers": version("transformers")},
        tasks=loaded.tasks,
        encoder=EncoderInfo(
            embedding_size=loaded.embedding_size,
            pooling=files.pooling,
            normalized=files.normalized,
            labels=loaded.labels,
            token_types=loaded.token_types,
            prompts=dict(files.prompts),
            default_prompt=files.default_prompt,
        ),
    )
    return core, ready


def _refuse_settings(settings: Settings) -> None:
    """Refuses settings that would have no effect.

    Raises:
        RefusedError: names them.
    """
    fields = type(settings).model_fields
    given = [
        f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        for name in _OF_DECODERS
        if (value := getattr(settings, name)) != fields[name].get_default(call_default_factory=True)
    ]
    if settings.weights == "float":  # as they are
        given.remove("--weights")
    if given:
        raise RefusedError(
            f"{', '.join(given)}: for models that generate text, and this one is an encoder; leave it out"
        )
