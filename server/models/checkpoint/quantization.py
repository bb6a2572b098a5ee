"""Checkpoints whose weights are published in few bits.

Weights of a known method are dequantized: they are those of the checkpoint, and activations are not rounded.
transformers warns of a method that it does not know and then serves codes as weights; and it takes a weight
whose scale is missing as it is. Here both refuse the model.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer as _Compressed

from server.errors import RefusedError
from server.models.checkpoint.files import Stored
from server.models.checkpoint.quantization_parts import INSTEAD, check_partners

log = logging.getLogger("longspan.models")

# Methods that can be served, and the package that reads each.
SERVED = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": None,
    "mxfp4": None,
    "torchao": "torchao",
}

# Those that transformers can dequantize as it loads.
_AS_LOADED = ("compressed-tensors", "fp8", "mxfp4")

_OTHERS = "Longspan does not read it"
_GPU = "it computes on a GPU only"
# Methods that transformers knows besides, and why they are not served.
UNSERVED = {
    "aqlm": _OTHERS,
    "auto-round": _OTHERS,
    "awq": _OTHERS,
    "bitnet": "its layers round activations as part of the model, which Longspan does not",
    "eetq": _GPU,
    "fbgemm_fp8": _GPU,
    "fouroversix": _OTHERS,
    "fp_quant": _GPU,
    "gemma": _OTHERS,
    "gguf": "serve the GGUF file itself",
    "gptq": _OTHERS,
    "higgs": _GPU,
    "hqq": _OTHERS,
    "metal": "it computes on Apple's GPUs only",
    "modelopt": "transformers does not read the scales of NVIDIA ModelOpt",
    "mxfp8": _OTHERS,
    "nvfp4": _GPU,
    "quanto": _OTHERS,
    "quark": _OTHERS,
    "sinq": _OTHERS,
    "spqr": _GPU,
    "vptq": _GPU,
}

# Formats of compressed-tensors, and configs of torchao, in which a weight is codes times scales and no more.
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")
_CONFIGS = ("Float8WeightOnlyConfig", "Int8WeightOnlyConfig", "IntxWeightOnlyConfig")


def read_method(folder: Path, config: Any, stored: Mapping[str, Stored]) -> str | None:
    """How a checkpoint is quantized, if it is.

    Args:
        folder: of the checkpoint.
        config: of the model.
        stored: what its files hold.

    Returns:
        One of ``SERVED``, or ``None`` for plain weights.

    Raises:
        RefusedError: in a way that can't be served, or not whole; the sentence says why.
    """
    details = quantization_details(config)
    if details is None:
        _check_plain(folder, config, stored)
        return None
    method = _method(folder, details)
    if method not in SERVED:
        reason = UNSERVED.get(method, "neither transformers nor Longspan knows it")
        raise RefusedError(f"the weights in {folder} are quantized with {method}: {reason}; {INSTEAD}")
    if obstacle := _obstacle(method, details):
        raise RefusedError(f"the weights in {folder} are quantized with {method}, {obstacle}; {INSTEAD}")
    check_partners(folder, method, details, stored)
    _check_package(folder, method)
    log.info("weights quantized with %s are computed dequantized, activations are not rounded", method)
    return method


def dequantizing(config: Any, method: str | None) -> Any:
    """A config that asks transformers to dequantize as it loads, where it can; a copy if it is another one.

    Args:
        config: of the model.
        method: as of ``read_method``.
    """
    if method not in _AS_LOADED:
        return config
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if (details := getattr(part, "quantization_config", None)) is not None:
            part.quantization_config = {**details, "dequantize": True}
    return config


def dequantize(model: Any, method: str, dtype: torch.dtype | str) -> Any:
    """The model with plain weights only, where transformers did not dequantize as it loaded.

    Args:
        model: as transformers loaded it.
        method: as of ``read_method``.
        dtype: what it was to be loaded in.
    """
    if method == "bitsandbytes":
        model = model.dequantize(dtype=model.dtype)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if type(weight.data) is not torch.Tensor:
                weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
                setattr(module, name, weight)
            # Some versions of transformers leave what they dequantize in bfloat16.
            if dtype == torch.float32 and weight.is_floating_point():
                weight.data = weight.data.float()
    return model


def quantization_details(config: Any) -> dict[str, Any] | None:
    """A config's description of how the weights are quantized."""
    for part in (config, config.get_text_config(decoder=True)):
        if (details := getattr(part, "quantization_config", None)) is not None:
            return details if isinstance(details, dict) else details.to_dict()
    return None


def _method(folder: Path, details: dict[str, Any]) -> str:
    if details.get("load_in_8bit") or details.get("load_in_4bit"):
        return "bitsandbytes"
    method = details.get("quant_method")
    if not isinstance(method, str):
        raise RefusedError(
            f"{folder}/config.json has a quantization_config without a quant_method, so how the weights are "
            f"quantized can't be told; {INSTEAD}"
        )
    return method


def _check_plain(folder: Path, config: Any, stored: Mapping[str, Stored]) -> None:
    """Signs of quantization that transformers does not look for."""
    if getattr(config, "compression_config", None):
        raise RefusedError(
            f"the weights in {folder} are quantized by an older form of compressed-tensors "
            f"(compression_config), which transformers does not read; {INSTEAD}"
        )
    own = folder / "hf_quant_config.json"
    if own.is_file():
        try:
            algorithm = json.loads(own.read_text()).get("quantization", {}).get("quant_algo")
        except (OSError, ValueError, AttributeError) as error:
            raise RefusedError(f"{own} can't be read: {error}") from error
        if algorithm:
            raise RefusedError(
                f"the weights in {folder} are quantized with modelopt ({algorithm}, says {own.name}): "
                f"{UNSERVED['modelopt']}; {INSTEAD}"
            )
    floats = [name for name, tensor in stored.items() if tensor.dtype.startswith(("F8_", "F6_", "F4"))]
    if floats:
        raise RefusedError(
            f"{len(floats)} weights in {folder} are in 8 bits or fewer ({floats[0]} is "
            f"{stored[floats[0]].dtype}), but its config names no quantization; {INSTEAD}, or fetch this "
            "one again with its complete config.json"
        )


def _obstacle(method: str, details: dict[str, Any]) -> str | None:
    """Why just these details can't be served."""
    if method == "compressed-tensors":
        return _compressed_obstacle(details)
    if method == "torchao":
        kind = details.get("quant_type")
        names = _type_names(kind) or {str(kind or "a checkpoint without a quant_type")}
        if strange := sorted(names - set(_CONFIGS)):
            return f"and of its configs Longspan reads {', '.join(_CONFIGS)}, not {strange[0]}"
    if method == "fp8" and details.get("modules_to_convert"):
        return "and modules_to_convert is not read"
    return None


def _compressed_obstacle(details: dict[str, Any]) -> str | None:
    groups = [group for group in (details.get("config_groups") or {}).values() if isinstance(group, dict)]
    if not groups:
        return "and its config_groups are missing"
    schemes = [(group.get("weights") or {}, group.get("format") or details.get("format")) for group in groups]
    if any(scheme != schemes[0] for scheme in schemes):
        return "in several ways for different layers (config_groups), which transformers reads as one"
    weights, form = schemes[0]
    if form not in _FORMATS:
        return f"in format {form}, and Longspan reads {', '.join(_FORMATS)}"
    if weights.get("strategy") not in _STRATEGIES or weights.get("actorder") == "group":
        return f"with strategy {weights.get('strategy')} and actorder {weights.get('actorder')}"
    if form in ("int-quantized", "naive-quantized") and not hasattr(_Compressed, "serialized_names"):
        version = transformers.__version__
        return f"in format {form}, which transformers {version} does not dequantize (a newer one does)"
    sparsity = (details.get("sparsity_config") or {}).get("format") or "dense"
    if sparsity != "dense":
        return f"and sparse ({sparsity})"
    if details.get("transform_config"):
        return "and rotated (transform_config)"
    return None


def _type_names(value: Any) -> set[str]:
    """All names of config classes in torchao's nested description."""
    if isinstance(value, str):
        return {value} if value.endswith("Config") else set()
    if isinstance(value, dict):
        own = {value["_type"]} if str(value.get("_type", "")).endswith("Config") else set()
        return own.union(*map(_type_names, value.values()))
    return set().union(*map(_type_names, value)) if isinstance(value, list) else set()


def _check_package(folder: Path, method: str) -> None:
    if (package := SERVED[method]) is None:
        return
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:  # packages break in many ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == package.replace("-", "_")
        raise RefusedError(
            f"the weights in {folder} are quantized with {method}, and package {package} "
            + ("is not installed" if missing else f"can't be imported ({type(error).__name__}: {error})")
            + f"; pip install {package}"
            + (f" {error.name}" if isinstance(error, ModuleNotFoundError) and not missing else "")
        ) from error
