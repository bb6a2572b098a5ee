"""Checkpoints in few bits, written by the conventions of each method and by none of its packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from server.models.quantized_checkpoint import UNSERVED
from tests.models.form import EXACT, Form, Tensors, edit_json, plain
from tests.models_zoo import save_tiny

Make = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Of a weight: its parts by what follows the module's name, and the weight that they stand for."""


def _quantized(
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


def _float8(rows: int = 32, columns: int = 32, scale: str = "weight_scale_inv") -> Make:
    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scales, full = _blocks(weight, rows, columns)
        codes = (weight / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, scale: scales}, codes.float() * full

    return make


def _float8_whole(scale: str, *more: str, shape: tuple[int, ...] = ()) -> Make:
    def make(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        factor = weight.abs().amax() / 448
        codes = (weight / factor).to(torch.float8_e4m3fn)
        parts = {name: torch.full(shape, 0.05) for name in more}
        return {"weight": codes, scale: factor.reshape(shape), **parts}, codes.float() * factor

    return make


def _int8(columns: int | None = None) -> Make:
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


def _packed(bits: int, *, symmetric: bool = True) -> Make:
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


def _compressed(form: str, weights: dict[str, Any], activations: Any = None, **more: Any) -> dict[str, Any]:
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


def _nf4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
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


def _llm_int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    largest = weight.abs().amax(-1)
    codes = (weight * 127 / largest[:, None]).round()
    parts = {
        "weight": codes.to(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, codes * largest[:, None] / 127


_BITSANDBYTES = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}


def _torchao(make: Make) -> Make:
    def named(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts, exact = make(weight)
        codes, scale = parts["weight"], next(part for name, part in parts.items() if "scale" in name)
        stored = {"_weight_qdata": codes, "_weight_scale": scale.reshape(-1, 1)}
        if codes.dtype == torch.int8:
            stored["_weight_zero_point"] = torch.zeros(len(codes), 1, dtype=torch.int8)
        return stored, exact

    return named


def _torchao_metadata(kind: str, **values: Any) -> Callable[[Tensors], dict[str, str]]:
    """What its safetensors say of each tensor."""

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


def _torchao_config(name: str, **data: Any) -> dict[str, Any]:
    config = {"_type": name, "_version": 2, "_data": {"set_inductor_config": True, **data}}
    return {"quant_method": "torchao", "quant_type": {"default": config}}


_PER_ROW = {"granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}}

_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _mxfp4(folder: Path, edit: Callable[[Tensors], Any] | None = None) -> Any:
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


def _lose(end: str) -> Callable[[Tensors], Any]:
    """Takes away the first tensor whose name ends so."""
    return lambda tensors: tensors.pop(min(name for name in tensors if name.endswith(end)))


_DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
_WHOLE = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
_CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel"}
_FLOATS = {"num_bits": 8, "type": "float"}
_GROUPS = {"type": "int", "strategy": "group", "group_size": 32}
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
_MODELOPT_PARTS = _float8_whole("weight_scale", "input_scale")

QUANTIZED = [
    Form("fp8 in blocks (DeepSeek, Qwen)", _quantized(_float8(), _DYNAMIC), EXACT),
    Form("fp8 in blocks, a mixture of experts", _quantized(_float8(), _DYNAMIC, "qwen3_moe"), EXACT),
    Form(
        "fp8, one scale a weight, and one for activations",
        _quantized(_float8_whole("weight_scale_inv", "activation_scale"), _WHOLE),
        EXACT,
    ),
    Form(
        "fp8 with a smaller last block",
        _quantized(_float8(48, 64), {**_DYNAMIC, "weight_block_size": [48, 64]}),
        r"is \[64, 128\] with \[2, 2\] scales .* does not divide into blocks of \[48, 64\]",
    ),
    Form(
        "fp8 without one of the scales",
        _quantized(_float8(), _DYNAMIC, edit=_lose("weight_scale_inv")),
        r"down_proj\.weight in .*, but model\.layers\.0\.mlp\.down_proj\.weight_scale_inv is missing",
    ),
    Form(
        "fp8 whose scales have other names (AutoFP8)",
        _quantized(_float8_whole("weight_scale", "input_scale"), _WHOLE),
        r"quantized with fp8, but .*weight_scale_inv is missing",
    ),
    Form(
        "fp8 and a config that does not say so",
        _quantized(_float8(), None),
        r"14 weights .* is F8_E4M3\), but its config names no quantization",
    ),
    Form("mxfp4 (gpt-oss)", _mxfp4, EXACT),
    Form(
        "mxfp4 without one of the scales",
        lambda folder: _mxfp4(folder, _lose("_scales")),
        r"experts\.down_proj_scales is missing",
    ),
    Form(
        "ModelOpt FP8 (quant_method: modelopt)",
        _quantized(_MODELOPT_PARTS, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        r"quantized with modelopt: transformers does not read the scales",
    ),
    Form(
        "ModelOpt FP8 (hf_quant_config.json alone)",
        _quantized(_MODELOPT_PARTS, None, beside={"hf_quant_config.json": _MODELOPT}),
        r"quantized with modelopt \(FP8, says hf_quant_config\.json\)",
    ),
    Form(
        "a quantization method that nobody knows",
        _quantized(_int8(), {"quant_method": "own"}),
        r"quantized with own: neither transformers nor Longspan knows it",
    ),
    Form(
        "an older form of compressed-tensors (compression_config)",
        _quantized(_int8(), None, legacy={"quant_method": "compressed-tensors"}),
        r"\(compression_config\), which transformers does not read",
    ),
    Form(
        "a quantization_config without a method", _quantized(_int8(), {"bits": 4}), "without a quant_method"
    ),
    Form(
        "int8 with scales, and a config that does not say so",
        _quantized(_int8(), None),
        r"are quantized: 14 tensors belong to that, model\.layers\.0\.mlp\.down_proj\.weight_scale",
    ),
    *(
        Form(
            method,
            _quantized(_int8(), {"quant_method": method, "bits": 4}),
            f"quantized with {method}: .*; choose",
        )
        for method in sorted(UNSERVED.keys() - {"modelopt"})
    ),
    Form(
        "compressed-tensors, 4 bits",
        _quantized(_packed(4), _compressed("pack-quantized", {"num_bits": 4, **_GROUPS})),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, 4 bits with offsets",
        _quantized(
            _packed(4, symmetric=False),
            _compressed("pack-quantized", {"num_bits": 4, **_GROUPS, "symmetric": False}),
        ),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, 8 bits packed",
        _quantized(_packed(8), _compressed("pack-quantized", {"num_bits": 8, **_GROUPS})),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, int8 and activations in int8",
        _quantized(_int8(), _compressed("int-quantized", _CHANNELS, _TOKENS)),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, int8 in groups",
        _quantized(_int8(32), _compressed("int-quantized", {"num_bits": 8, **_GROUPS})),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, fp8 in blocks, the last one smaller",
        _quantized(
            _float8(48, 48, "weight_scale"),
            _compressed("float-quantized", {**_FLOATS, "strategy": "block", "block_structure": [48, 48]}),
        ),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, fp8 and one scale for activations",
        _quantized(
            _float8_whole("weight_scale", "input_scale", shape=(1,)),
            _compressed("float-quantized", {**_FLOATS, "strategy": "tensor"}),
        ),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, 4 bits, a mixture of experts",
        _quantized(_packed(4), _compressed("pack-quantized", {"num_bits": 4, **_GROUPS}), "qwen3_moe"),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors in several ways",
        _quantized(
            _int8(),
            _compressed(
                "int-quantized",
                _CHANNELS,
                config_groups={
                    "group_0": {"targets": ["re:.*attn.*"], "weights": _CHANNELS},
                    "group_1": {"targets": ["re:.*mlp.*"], "weights": _FLOATS},
                },
            ),
        ),
        r"in several ways for different layers \(config_groups\)",
    ),
    Form(
        "compressed-tensors, NVFP4",
        _quantized(_int8(), _compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"})),
        "in format nvfp4-pack-quantized, and Longspan reads",
    ),
    Form(
        "compressed-tensors, sparse",
        _quantized(
            _int8(), _compressed("int-quantized", _CHANNELS, sparsity_config={"format": "sparse-24-bitmask"})
        ),
        r"sparse \(sparse-24-bitmask\)",
    ),
    Form(
        "bitsandbytes, 4 bits (NF4)",
        _quantized(_nf4, {**_BITSANDBYTES, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        EXACT,
        "bitsandbytes",
    ),
    Form(
        "bitsandbytes, 8 bits",
        _quantized(_llm_int8, {**_BITSANDBYTES, "load_in_8bit": True}),
        EXACT,
        "bitsandbytes",
    ),
    Form(
        "bitsandbytes, 8 bits without one of the scales",
        _quantized(_llm_int8, {**_BITSANDBYTES, "load_in_8bit": True}, edit=_lose("SCB")),
        r"down_proj\.SCB is missing",
    ),
    Form(
        "torchao, int8",
        _quantized(
            _torchao(_int8()),
            _torchao_config("Int8WeightOnlyConfig", group_size=None, **_PER_ROW),
            metadata=_torchao_metadata("Int8Tensor", reduce_range=False),
        ),
        EXACT,
        "torchao",
    ),
    Form(
        "torchao with rounded activations",
        _quantized(_torchao(_int8()), _torchao_config("Int8DynamicActivationInt8WeightConfig")),
        "not Int8DynamicActivationInt8WeightConfig",
    ),
    Form(
        "torchao of the time when its configs were words",
        _quantized(_torchao(_int8()), {"quant_method": "torchao", "quant_type": "int8_weight_only"}),
        "not int8_weight_only",
    ),
]
