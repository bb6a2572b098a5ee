"""A model as its config describes it, on torch's meta device, compared with what a checkpoint's files hold.

All this is known before memory is taken for a weight: transformers would allocate and fill whatever a config
describes and the files lack.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping

from server.errors import RefusedError
from server.models.checkpoint.files import Stored
from server.models.checkpoint.quantization_parts import is_quantized
from server.models.checkpoint.weights import FLOATS, check_floats, mismatches, not_those

# Of the architectures of transformers none makes more than three parameters of one tensor.
_PARAMETERS_PER_TENSOR = 8
_PARAMETERS_BESIDE = 1000
# Tables over positions that are computed and not stored are the only large floats that a file may lack.
_TIMES_HELD = 2
_WEIGHTS_BESIDE = 1 << 24


def outline(kind: Any, config: Any, tensors: int, **more: Any) -> Any:
    """transformers' model of a config, without memory for weights.

    Args:
        kind: ``AutoModelForCausalLM`` or another class of transformers.
        config: of such a model.
        tensors: how many its files hold.
        **more: arguments of the model's own class.

    Raises:
        ValueError: it has far more parameters than these could fill; a million layers are not built first.
        Exception: whatever its class raises of a config that it can't build.
    """
    most, made = _PARAMETERS_PER_TENSOR * tensors + _PARAMETERS_BESIDE, 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(
                f"its config describes a model of more than {most} parameters, but its files hold {tensors} "
                "tensors; fetch the config that belongs to them"
            )

    counting = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return kind.from_config(
                copy.deepcopy(config),  # which it changes
                dtype=torch.float32,
                trust_remote_code=False,
                attn_implementation="eager",
                **more,
            )
    finally:
        counting.remove()


def check_outline(
    model: Any,
    stored: Mapping[str, Stored],
    folder: Path,
    method: str | None,
    details: Mapping[str, Any] | None,
    held: int,
) -> int:
    """Refuses files that can't be the weights of the model that their config describes.

    Args:
        model: of ``outline``.
        stored: what the files hold.
        folder: where they lie.
        method: how the weights are quantized, if they are.
        details: what the config says of that.
        held: how many weights the files hold, once they are dequantized.

    Returns:
        The numbers of the model's parameters and floating-point buffers, each once.

    Raises:
        RefusedError: a tensor has another shape, or integers where the model has floats, or the model is far
            larger than its files; by name.
    """
    places = model.state_dict()
    found = [(name, stored[name], places[target]) for name, target in _targets(model, stored, places)]
    if method is None:
        shapes = [(name, tensor.shape, tuple(place.shape)) for name, tensor, place in found]
        if wrong := mismatches([each for each in shapes if each[1] != each[2]]):
            raise RefusedError(not_those(model, [wrong], folder))
    else:
        integers = [
            name
            for name, tensor, place in found
            if tensor.dtype not in FLOATS
            and place.is_floating_point()
            and not is_quantized(name, stored, method, details or {})
        ]
        check_floats(integers, stored, folder, method)
    floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    own = sum(part.numel() for part in (*model.parameters(), *floats))
    if own > _TIMES_HELD * held + _WEIGHTS_BESIDE:
        raise RefusedError(
            f"config.json describes a {type(model).__name__} of {own:,} weights, but the files in {folder} "
            f"hold {held:,}; fetch the config.json that belongs to them"
        )
    return own


def _targets(model: Any, stored: Mapping[str, Stored], places: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tensors that become a parameter as they are, with the parameter; as transformers finds it."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, core_model_loading.WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, core_model_loading.WeightConverter)]
    found = []
    for name in stored:
        target, converted = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, places
        )
        if target not in places and name in places:
            target, converted = core_model_loading.rename_source_key(
                name, [], [], model.base_model_prefix, places
            )
        if converted is None and target in places:
            found.append((name, target))
    return found
