"""Loads a model folder into transformers' own classes, with attention handed to Longspan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from attention.backends import UnsupportedError
from attention.hook import register
from attention.layers import read_layers
from attention.rope import LengthRope
from server.errors import RefusedError
from server.models.checkpoint.files import Stored
from server.models.checkpoint.outline import check_outline, outline
from server.models.checkpoint.quantization import (
    dequantize,
    dequantizing,
    quantization_details,
    read_method,
)
from server.models.checkpoint.quantization_parts import weight_count
from server.models.checkpoint.reading import Reading, noting, read_stored
from server.models.checkpoint.weights import check_finite, check_made, check_read
from server.models.folder import weight_files
from server.models.limits import context_length, steady_length
from server.models.loaded import LoadedModel
from server.models.memory import available_bytes
from server.models.recognize import read_config
from server.models.refusing import refusing, sentence
from server.models.rope import RopeScaling, check_scaling

log = logging.getLogger("longspan.models")


def load_model(
    folder: Path,
    dtype: str,
    device: torch.device | str,
    max_context: int | None,
    report: Callable[[str, float], None],
    *,
    reach: int | None = None,
    scaling: RopeScaling | None = None,
) -> LoadedModel:
    """Loads, freezes, and reads what attention must honor. Code that comes with a checkpoint is never run.

    Args:
        folder: a Hugging Face folder.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is float32 on the CPU and the
            checkpoint's own elsewhere.
        device: where to load it.
        max_context: the most tokens of prompt and output together; ``None`` for the model's own limit.
        report: told the progress.
        reach: the attention pattern's, see ``attention.patterns.base.Pattern``.
        scaling: how rotary positions are stretched; ``None`` for as the model says.

    Raises:
        RefusedError: the model can't be served; the sentence says why.
    """
    device = torch.device(device)
    report("reading the config", 0.0)
    config = read_config(folder)
    with refusing(f"the model in {folder}", "reading its config"):
        length = context_length(config, max_context, reach=reach, scaling=scaling)
    stored = read_stored(weight_files(folder))
    model = read_model(transformers.AutoModelForCausalLM, folder, config, stored, dtype, device, report)

    report("reading the attention layers", 0.8)
    with refusing(type(model).__name__, "reading its layers"):
        return _read(model, config, length, scaling, device)


def _read(
    model: Any, config: Any, length: int, scaling: RopeScaling | None, device: torch.device
) -> LoadedModel:
    """The features of a loaded model that attention must honor."""
    register()
    model.set_attn_implementation("longspan")
    layers = read_layers(model)
    if scaling is not None:
        check_scaling(model, scaling)
    return LoadedModel(
        model=model,
        layers=layers,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary_size=model.get_output_embeddings().weight.shape[0],
        context_length=length,
        dtype=model.dtype,
        rope=_length_rope(model, config, length),
    )


def _length_rope(model: Any, config: Any, length: int) -> LengthRope | None:
    try:
        return LengthRope.of(model)
    except UnsupportedError as error:
        steady = steady_length(config)
        if steady is None or length > steady:
            hint = "choose another model" if steady is None else f"serve it within --max-context {steady}"
            raise RefusedError(f"{error}; {hint}") from error
        return None


def read_model(
    kind: Any,
    folder: Path,
    config: Any,
    stored: Mapping[str, Stored],
    dtype: str,
    device: torch.device,
    report: Callable[[str, float], None],
    **more: Any,
) -> Any:
    """A frozen model that is the whole of its files.

    Args:
        kind: ``AutoModelForCausalLM`` or another class of transformers.
        folder: a Hugging Face folder.
        config: its config.
        stored: what its files hold.
        dtype: of weights and computation, as of ``load_model``.
        device: where to load it.
        report: told the progress.
        **more: arguments of the model's own class.

    Raises:
        RefusedError: memory has no room for it, it can't be loaded, or has tensors too many or too few.
    """
    chosen = "float32" if dtype == "auto" and device.type == "cpu" else dtype
    wanted = chosen if chosen == "auto" else getattr(torch, chosen)
    method = read_method(folder, config, stored)
    _check_size(kind, folder, config, stored, method, wanted, device, **more)
    report("loading the weights", 0.1)
    # The refusals here say what matters of its reports; its progress bars would disturb the server's own.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = _read_files(kind, folder, config, stored, method, wanted, device, **more)
    return model.eval().requires_grad_(False)


def _read_files(
    kind: Any,
    folder: Path,
    config: Any,
    stored: Mapping[str, Stored],
    method: str | None,
    dtype: torch.dtype | str,
    device: torch.device,
    **more: Any,
) -> Any:
    """Arguments are those of ``read_model``, but for two.

    ``method`` says how the weights are quantized, if they are. With ``auto`` as ``dtype`` weights keep that
    of the checkpoint.
    """
    # Elsewhere than on the CPU, weights go straight to the device.
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    if kind is transformers.AutoModelForCausalLM:
        # The folder's own is for generate, which is not used; a faulty one must not refuse a model.
        more["generation_config"] = transformers.GenerationConfig()
    with noting() as reading, _building(folder, device, reading):
        model = kind.from_pretrained(
            folder,
            config=dequantizing(config, method),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            # Of any model. Its config may name a package that only transformers would use.
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **more,
            **place,
        )
    check_read(model, reading, stored, folder, method)
    if method is not None:
        model = dequantize(model, method, dtype)
    check_finite(model, stored, folder)
    return model


@contextmanager
def _building(folder: Path, device: torch.device, reading: Reading | None = None) -> Iterator[None]:
    """Turns what transformers raises while it builds or reads a model into a refusal."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RefusedError(
            f"the weights of {folder} don't fit into the memory of {device}; "
            "choose a smaller model or --dtype bfloat16"
        ) from error
    except Exception as error:  # broken files fail in many ways
        if reading is not None:
            check_made(reading, folder)
        unknown = f"its config makes transformers look for {error}, which it does not know"
        reason = unknown if isinstance(error, KeyError) else sentence(error)
        raise RefusedError(f"the model in {folder} can't be loaded: {reason}") from error


def _check_size(
    kind: Any,
    folder: Path,
    config: Any,
    stored: Mapping[str, Stored],
    method: str | None,
    dtype: torch.dtype | str,
    device: torch.device,
    **more: Any,
) -> None:
    """Refuses weights that can't fit, since running out would kill this process without a message.

    Arguments are those of ``_read_files``.

    Raises:
        RefusedError: they aren't the config's, or need more than is free.
    """
    details = quantization_details(config)
    held = weight_count(stored, details)
    with _building(folder, device):
        model = outline(kind, config, len(stored), **more)
    described = check_outline(model, stored, folder, method, details, held)
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.get_default_dtype()
    each = dtype.itemsize if isinstance(dtype, torch.dtype) else own.itemsize
    masks = sum(buffer.nbytes for buffer in model.buffers() if not buffer.is_floating_point())
    needed = max(held, described) * each + masks
    free = available_bytes(device)
    if needed > free:
        raise RefusedError(
            f"the weights of {folder} need {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of "
            f"{device} are free; choose a smaller model, or --dtype bfloat16 if it is wider"
        )
