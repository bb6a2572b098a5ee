"""Checkpoints in few bits, and what becomes of them."""

from __future__ import annotations

from server.models.checkpoint.quantization import UNSERVED
from tests.models.form import EXACT, Form
from tests.models.quantized_writers import (
    BITSANDBYTES,
    PER_ROW,
    compressed,
    float8,
    float8_whole,
    int8,
    llm_int8,
    lose,
    mxfp4,
    nf4,
    packed,
    quantized,
    torchao,
    torchao_config,
    torchao_metadata,
)

_DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
_WHOLE = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
_CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel"}
_FLOATS = {"num_bits": 8, "type": "float"}
_GROUPS = {"type": "int", "strategy": "group", "group_size": 32}
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
_MODELOPT_PARTS = float8_whole("weight_scale", "input_scale")

QUANTIZED = [
    Form("fp8 in blocks (DeepSeek, Qwen)", quantized(float8(), _DYNAMIC), EXACT),
    Form("fp8 in blocks, a mixture of experts", quantized(float8(), _DYNAMIC, "qwen3_moe"), EXACT),
    Form(
        "fp8, one scale a weight, and one for activations",
        quantized(float8_whole("weight_scale_inv", "activation_scale"), _WHOLE),
        EXACT,
    ),
    Form(
        "fp8 with a smaller last block",
        quantized(float8(48, 64), {**_DYNAMIC, "weight_block_size": [48, 64]}),
        r"is \[64, 128\] with \[2, 2\] scales .* does not divide into blocks of \[48, 64\]",
    ),
    Form(
        "fp8 without one of the scales",
        quantized(float8(), _DYNAMIC, edit=lose("weight_scale_inv")),
        r"down_proj\.weight in .*, but model\.layers\.0\.mlp\.down_proj\.weight_scale_inv is missing",
    ),
    Form(
        "fp8 whose scales have other names (AutoFP8)",
        quantized(float8_whole("weight_scale", "input_scale"), _WHOLE),
        r"quantized with fp8, but .*weight_scale_inv is missing",
    ),
    Form(
        "fp8 and a config that does not say so",
        quantized(float8(), None),
        r"14 weights .* is F8_E4M3\), but its config names no quantization",
    ),
    Form("mxfp4 (gpt-oss)", mxfp4, EXACT),
    Form(
        "mxfp4 without one of the scales",
        lambda folder: mxfp4(folder, lose("_scales")),
        r"experts\.down_proj_scales is missing",
    ),
    Form(
        "ModelOpt FP8 (quant_method: modelopt)",
        quantized(_MODELOPT_PARTS, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        r"quantized with modelopt: transformers does not read the scales",
    ),
    Form(
        "ModelOpt FP8 (hf_quant_config.json alone)",
        quantized(_MODELOPT_PARTS, None, beside={"hf_quant_config.json": _MODELOPT}),
        r"quantized with modelopt \(FP8, says hf_quant_config\.json\)",
    ),
    Form(
        "an unknown quantization method",
        quantized(int8(), {"quant_method": "own"}),
        r"quantized with own: neither transformers nor Longspan knows it",
    ),
    Form(
        "an older form of compressed-tensors (compression_config)",
        quantized(int8(), None, legacy={"quant_method": "compressed-tensors"}),
        r"\(compression_config\), which transformers does not read",
    ),
    Form("a quantization_config without a method", quantized(int8(), {"bits": 4}), "without a quant_method"),
    Form(
        "int8 with scales, and a config that does not say so",
        quantized(int8(), None),
        r"are quantized: 14 tensors belong to that, model\.layers\.0\.mlp\.down_proj\.weight_scale",
    ),
    *(
        Form(
            method,
            quantized(int8(), {"quant_method": method, "bits": 4}),
            f"quantized with {method}: .*; choose",
        )
        for method in sorted(UNSERVED.keys() - {"modelopt"})
    ),
    Form(
        "compressed-tensors, 4 bits",
        quantized(packed(4), compressed("pack-quantized", {"num_bits": 4, **_GROUPS})),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, 4 bits with offsets",
        quantized(
            packed(4, symmetric=False),
            compressed("pack-quantized", {"num_bits": 4, **_GROUPS, "symmetric": False}),
        ),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, 8 bits packed",
        quantized(packed(8), compressed("pack-quantized", {"num_bits": 8, **_GROUPS})),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, int8 and activations in int8",
        quantized(int8(), compressed("int-quantized", _CHANNELS, _TOKENS)),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, int8 in groups",
        quantized(int8(32), compressed("int-quantized", {"num_bits": 8, **_GROUPS})),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, fp8 in blocks, the last one smaller",
        quantized(
            float8(48, 48, "weight_scale"),
            compressed("float-quantized", {**_FLOATS, "strategy": "block", "block_structure": [48, 48]}),
        ),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, fp8 and one scale for activations",
        quantized(
            float8_whole("weight_scale", "input_scale", shape=(1,)),
            compressed("float-quantized", {**_FLOATS, "strategy": "tensor"}),
        ),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors, 4 bits, a mixture of experts",
        quantized(packed(4), compressed("pack-quantized", {"num_bits": 4, **_GROUPS}), "qwen3_moe"),
        EXACT,
        "compressed-tensors",
    ),
    Form(
        "compressed-tensors in several ways",
        quantized(
            int8(),
            compressed(
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
        quantized(int8(), compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"})),
        "in format nvfp4-pack-quantized, and Longspan reads",
    ),
    Form(
        "compressed-tensors, sparse",
        quantized(
            int8(), compressed("int-quantized", _CHANNELS, sparsity_config={"format": "sparse-24-bitmask"})
        ),
        r"sparse \(sparse-24-bitmask\)",
    ),
    Form(
        "bitsandbytes, 4 bits (NF4)",
        quantized(nf4, {**BITSANDBYTES, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        EXACT,
        "bitsandbytes",
    ),
    Form(
        "bitsandbytes, 8 bits",
        quantized(llm_int8, {**BITSANDBYTES, "load_in_8bit": True}),
        EXACT,
        "bitsandbytes",
    ),
    Form(
        "bitsandbytes, 8 bits without one of the scales",
        quantized(llm_int8, {**BITSANDBYTES, "load_in_8bit": True}, edit=lose("SCB")),
        r"down_proj\.SCB is missing",
    ),
    Form(
        "torchao, int8",
        quantized(
            torchao(int8()),
            torchao_config("Int8WeightOnlyConfig", group_size=None, **PER_ROW),
            metadata=torchao_metadata("Int8Tensor", reduce_range=False),
        ),
        EXACT,
        "torchao",
    ),
    Form(
        "torchao with rounded activations",
        quantized(torchao(int8()), torchao_config("Int8DynamicActivationInt8WeightConfig")),
        "not Int8DynamicActivationInt8WeightConfig",
    ),
    Form(
        "torchao of the time when its configs were words",
        quantized(torchao(int8()), {"quant_method": "torchao", "quant_type": "int8_weight_only"}),
        "not int8_weight_only",
    ),
]
