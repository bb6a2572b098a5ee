"""Checkpoints in few bits, written by the conventions of each method and by none of its packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.form import Tensors, edit_json, plain
from tests.models_zoo import save_tiny

Make = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A weight's parts by what follows the module's name, and the weight that they stand for."""


def quantized(
    make: Make,
    config: dict[str, Any] | None,
    kind: str = "llama",
    *,
    edit: Callable[[Tensors], Any] | None = None,
    beside: dict[str, Any] | None = None,
    metadata: Callable[[Tensors], dict[str, str]] | None = None,
    legacy: dict[str, Any] | None = None,
) -> Callable[[Path], Any]:
    """Writes a tiny model whose projections are quantized; gives one with the weights that they stand for."""

    def write(folder: Path) -> Any:
        file = save_tiny(kind, folder) / "model.safetensors"
        tensors = load_file(file)
        stored: Tensors = {}
        for name, weight in list(tensors.items()):
            if not name.endswith("_proj.weight"):
                stored[name] = weight
                continue
            parts, tensors[name] = make(weight)
            stored |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
        model = _with(folder, tensors)
        if edit:
            edit(stored)
        save_file(stored, file, {"format": "pt"} | (metadata(tensors) if metadata else {}))
        edit_json(folder / "config.json", quantization_config=config, compression_config=legacy)
        for name, content in (beside or {}).items():
            (folder / name).write_text(json.dumps(content))
        return model

    return write


def _with(folder: Path, tensors: Tensors) -> Any:
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return plain(folder)


def _spread(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Each weight's own scale, of scales of blocks of which the last may be smaller."""
    rows, columns = shape
    return scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def _blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(weight.shape[0])
    counts = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scales = 0.002 + 0.01 * torch.rand(counts, generator=generator)
    return scales, _spread(scales, (rows, columns), tuple(weight.shape))


def float8(rows: int = 32, columns: int = 32, scale: str = "weight_scale_inv") -> Make:
    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scales, full = _blocks(weight, rows, columns)
        codes = (weight / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, scale: scales}, codes.float() * full

    return make


def float8_whole(scale: str, *more: str, shape: tuple[int, ...] = ()) -> Make:
    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        factor = weight.abs().amax() / 448
        codes = (weight / factor).to(torch.float8_e4m3fn)
        parts = {name: torch.full(shape, 0.05) for name in more}
        return {"weight": codes, scale: factor.reshape(shape), **parts}, codes.float() * factor

    return make


def int8(columns: int | None = None) -> Make:
    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        grouped = weight.unflatten(1, (-1, columns or weight.shape[1]))
        scales = grouped.abs().amax(-1) / 127
        codes = (grouped / scales[..., None]).round()
        exact = (codes * scales[..., None]).flatten(1)
        return {"weight": codes.flatten(1).to(torch.int8), "weight_scale": scales}, exact

    return make


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of few bits in 32-bit words along the last dimension, the first in the lowest bits."""
    parts = codes.long().unflatten(1, (-1, 32 // bits))
    words = sum(parts[..., n] << (bits * n) for n in range(32 // bits))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def packed(bits: int, *, symmetric: bool = True) -> Make:
    most = 1 << (bits - 1)

    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        grouped = weight.unflatten(1, (-1, 32))
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales = grouped.abs().amax(-1) / (most - 1) if symmetric else (high - low) / (2 * most - 1)
        zeros = (
            torch.zeros_like(scales) if symmetric else (-most - low / scales).round().clamp(-most, most - 1)
        )
        codes = ((grouped / scales[..., None]).round() + zeros[..., None]).clamp(-most, most - 1)
        parts = {
            "weight_packed": _words(codes.flatten(1) + most, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = _words((zeros + most).T, bits).T
        return parts, ((codes - zeros[..., None]) * scales[..., None]).flatten(1)

    return make


def compressed(form: str, weights: dict[str, Any], activations: Any = None, **more: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, **weights},
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


_NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
    ]
)


def nf4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(-1)
    codes = (blocks / largest[:, None])[..., None].sub(_NF4).abs().argmin(-1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    flat = codes.reshape(-1, 2)
    parts = {
        "weight": (flat[:, :1] << 4 | flat[:, 1:]).to(torch.uint8),
        "weight.absmax": largest,
        "weight.quant_map": _NF4.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return parts, (_NF4[codes] * largest[:, None]).reshape(weight.shape)


def llm_int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    largest = weight.abs().amax(-1)
    codes = (weight * 127 / largest[:, None]).round()
    parts = {
        "weight": codes.to(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, codes * largest[:, None] / 127


BITSANDBYTES = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}


def torchao(make: Make) -> Make:
    def named(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts, exact = make(weight)
        codes, scale = parts["weight"], next(part for name, part in parts.items() if "scale" in name)
        stored = {"_weight_qdata": codes, "_weight_scale": scale.reshape(-1, 1)}
        if codes.dtype == torch.int8:
            stored["_weight_zero_point"] = torch.zeros(len(codes), 1, dtype=torch.int8)
        return stored, exact

    return named


def torchao_metadata(kind: str, **values: Any) -> Callable[[Tensors], dict[str, str]]:
    """Each tensor as its safetensors describe it."""

    def metadata(tensors: Tensors) -> dict[str, str]:
        said: dict[str, Any] = {}
        for name, tensor in tensors.items():
            said[name] = {"_type": "Tensor"}
            if name.endswith("_proj.weight"):
                dtype = {"_type": "torch.dtype", "_data": "float32"}
                data = {
                    "block_size": [1, tensor.shape[1]],
                    "dtype": dtype,
                    "act_quant_kwargs": None,
                    **values,
                }
                names = ["qdata", "scale"] + (["zero_point"] if kind == "Int8Tensor" else [])
                said[name] = {"_type": kind, "_data": data, "_tensor_data_names": names}
        said["tensor_names"] = list(tensors)
        return {name: json.dumps(value) for name, value in said.items()}

    return metadata


def torchao_config(name: str, **data: Any) -> dict[str, Any]:
    config = {"_type": name, "_version": 2, "_data": {"set_inductor_config": True, **data}}
    return {"quant_method": "torchao", "quant_type": {"default": config}}


PER_ROW = {"granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}}

_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(folder: Path, edit: Callable[[Tensors], Any] | None = None) -> Any:
    """Experts of two dimensions and more in blocks of 32 with a power of two each, as gpt-oss publishes."""
    save_tiny("llama", folder)
    config = transformers.GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=2,
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(0)
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    stored = dict(tensors)
    for name, weight in list(tensors.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        blocks = weight.transpose(1, 2).unflatten(2, (-1, 32))
        exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
        codes = (blocks / 2 ** exponents[..., None])[..., None].sub(_FP4).abs().argmin(-1)
        tensors[name] = (_FP4[codes] * 2 ** exponents[..., None]).flatten(2).transpose(1, 2)
        del stored[name]
        stored[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    exact = _with(folder, tensors)
    if edit:
        edit(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    return exact


def lose(end: str) -> Callable[[Tensors], Any]:
    """Takes away the first tensor whose name ends so."""
    return lambda tensors: tensors.pop(min(name for name in tensors if name.endswith(end)))
