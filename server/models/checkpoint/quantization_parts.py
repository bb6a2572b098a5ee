"""The parts of a quantized weight in a file: codes, scales and more.

transformers takes a weight whose scale is missing as it is. Here each weight has its scales, and each scale
its weight, before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from server.errors import RefusedError
from server.models.checkpoint.files import Stored

INSTEAD = "choose the unquantized checkpoint, or a GGUF file of the model"

_EIGHT_BITS = re.compile(r"F8_\w+|F6_\w+|F4|I8|U8")
# Other tensors that quantization leaves in a file.
_PARTS = re.compile(
    r"(?:^|[._])(?:(?:weight|input|output|activation)(?:_global)?_(?:scales?|zero_points?|shape|packed|format)"
    r"(?:_inv|_2)?|scales?|scale_inv|qscale_\w+|qweight|qzeros|g_idx|zero_points?|absmax|quant_map"
    r"|nested_absmax|nested_quant_map|quant_state\.\w+|SCB|blocks|qdata|codebooks|codes|amax)$"
)
_SCALES = re.compile(r"weight_scale(?:_inv)?$|_scale_inv$|_scales$|\.absmax$|\.SCB$")
_OF_ACTIVATIONS = re.compile(r"\.(?:input|output|activation)_(?:scale|zero_point)$")


def looks_quantized(name: str) -> bool:
    """Whether a tensor's name is one that quantization gives."""
    return bool(_PARTS.search(name))


def of_activations(name: str) -> bool:
    """Whether a tensor only says how activations were to be rounded."""
    return bool(_OF_ACTIVATIONS.search(name))


def is_quantized(name: str, stored: Mapping[str, Stored], method: str, details: Mapping[str, Any]) -> bool:
    """Whether a tensor holds codes, or belongs to one that does.

    Args:
        name: of the tensor.
        stored: what the files hold.
        method: how the checkpoint is quantized.
        details: what its config says of that.
    """
    return looks_quantized(name) or _partners(name, stored, method, details) is not None


def weight_count(stored: Mapping[str, Stored], details: dict[str, Any] | None) -> int:
    """How many numbers a checkpoint's weights are, once they are dequantized where they are quantized.

    Args:
        stored: what its files hold.
        details: what its config says of quantization.
    """
    bits = [
        group.get("weights", {}).get("num_bits", 4)
        for group in ((details or {}).get("config_groups") or {}).values()
        if isinstance(group, dict)
    ]
    each = {"I32": 32 // min(bits, default=4), "U8": 2} if details else {}
    return sum(torch.Size(tensor.shape).numel() * each.get(tensor.dtype, 1) for tensor in stored.values())


def check_partners(folder: Path, method: str, details: dict[str, Any], stored: Mapping[str, Stored]) -> None:
    """Refuses a checkpoint where a weight lacks its scales, a scale its weight, or their shapes do not fit.

    Args:
        folder: of the checkpoint.
        method: how it is quantized.
        details: what its config says of that.
        stored: what its files hold.

    Raises:
        RefusedError: names the tensor.
    """
    required: set[str] = set()
    for name, tensor in stored.items():
        partners = _partners(name, stored, method, details)
        if partners is None:
            if _EIGHT_BITS.fullmatch(tensor.dtype) and not looks_quantized(name):
                raise RefusedError(
                    f"{name} in {folder} is {tensor.dtype}, which is not how {method} keeps weights; "
                    f"{INSTEAD}"
                )
            continue
        for partner in partners:
            if partner not in stored:
                raise RefusedError(
                    f"{name} in {folder} is quantized with {method}, but {partner} is missing, without which "
                    "it is wrong; fetch the checkpoint again"
                )
        required.update(partners)
        if method == "fp8":
            _check_blocks(folder, name, tensor.shape, stored[partners[0]], details.get("weight_block_size"))
    if unpaired := [name for name in stored if _SCALES.search(name) and name not in required]:
        raise RefusedError(
            f"{unpaired[0]} in {folder} belongs to a weight that is not quantized with {method}; "
            "fetch the checkpoint again"
        )


def _partners(
    name: str, stored: Mapping[str, Stored], method: str, details: Mapping[str, Any]
) -> list[str] | None:
    """The tensors that a quantized weight needs; ``None`` where it is not quantized."""
    stem, dtype = name.rpartition(".")[0] + ".", stored[name].dtype
    if method == "fp8" and dtype == "F8_E4M3":
        return [f"{name}_scale_inv"]
    if method == "mxfp4" and name.endswith("_blocks"):
        return [name.removesuffix("blocks") + "scales"]
    if method == "torchao" and name.endswith("_qdata"):
        return [name.removesuffix("qdata") + "scale"]
    if method == "bitsandbytes" and dtype == "I8":
        return [f"{stem}SCB"]
    # The bytes of 4-bit weights may be stored as if they were of another type.
    if method == "bitsandbytes" and (
        f"{name}.absmax" in stored or (dtype == "U8" and name.endswith(".weight"))
    ):
        return [f"{name}.absmax"]
    if method == "compressed-tensors":
        group = next(iter(details["config_groups"].values()))
        zero = [] if group["weights"].get("symmetric", True) else [f"{stem}weight_zero_point"]
        if name.endswith(".weight_packed"):
            return [f"{stem}weight_scale", f"{stem}weight_shape", *zero]
        if name.endswith(".weight") and dtype in ("F8_E4M3", "I8"):
            return [f"{name}_scale", *zero]
    return None


def _check_blocks(folder: Path, name: str, shape: tuple[int, ...], scale: Stored, block: Any) -> None:
    """transformers divides a weight evenly among its scales, also where the last block is to be smaller."""
    *_, rows, columns = shape
    if block:
        fits = scale.shape[-2:] == (-(-rows // block[0]), -(-columns // block[1])) and all(
            size % edge == 0 or size < edge for size, edge in ((rows, block[0]), (columns, block[1]))
        )
    else:
        fits = scale.shape in ((), (1,), (1, 1), (rows, 1))
    if not fits or scale.dtype not in ("F32", "BF16", "F16"):
        raise RefusedError(
            f"{name} in {folder} is {list(shape)} with {list(scale.shape)} scales in {scale.dtype}, which "
            f"transformers does not divide into blocks of {block or 'one scale'}; {INSTEAD}"
        )
