"""Forms in which checkpoints are met, each written as a small folder, and what serving makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.form import EXACT, Form, Tensors, edit_json, edited, plain, put, sharded
from tests.models.quantized_forms import QUANTIZED
from tests.models_zoo import save_tiny


def _adding(added: Tensors, kind: str = "llama", config: dict[str, Any] | None = None, **made: Any) -> Any:
    return edited(lambda tensors: tensors.update(added), kind, config, **made)


def _beside(files: dict[str, Any], config: dict[str, Any] | None = None) -> Callable[[Path], Any]:
    """Writes a tiny model with JSON files beside it."""

    def write(folder: Path) -> Any:
        model = plain(save_tiny("llama", folder))
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        edit_json(folder / "config.json", **(config or {}))
        return model

    return write


def _layer(tensors: Tensors, number: int, kept: Iterable[str] = ("",)) -> Tensors:
    """Tensors of the first layer, as those of another."""
    return {
        name.replace(".layers.0.", f".layers.{number}."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.0." in name and any(part in name for part in kept)
    }


def _twice(folder: Path, index: dict[str, Any]) -> None:
    first, second = (load_file(folder / f"model-0000{n}-of-00002.safetensors") for n in (1, 2))
    name = min(first)
    save_file(second | {name: first[name] + 1}, folder / "model-00002-of-00002.safetensors", {"format": "pt"})


def _pickled(content: Callable[[Tensors], Any]) -> Callable[[Path], Any]:
    def write(folder: Path) -> Any:
        model = plain(save_tiny("llama", folder))
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(content(tensors), folder / "pytorch_model.bin")
        return model

    return write


def _cut(folder: Path) -> None:
    file = save_tiny("llama", folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _classifier(folder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(save_tiny("llama", folder))
    model.save_pretrained(folder)


def _another_head(folder: Path) -> Any:
    """A config that ties what the file holds apart; transformers believes the file."""
    model = plain(save_tiny("llama", folder))
    edit_json(folder / "config.json", tie_word_embeddings=True)
    return model


def _consolidated(folder: Path) -> Any:
    model = plain(save_tiny("llama", folder))
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    return model


def _named_by_the_config(folder: Path) -> Any:
    model = plain(save_tiny("llama", folder))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    edit_json(folder / "config.json", transformers_weights="weights.safetensors")
    return model


def _remove(tensors: Tensors, name: str) -> None:
    del tensors[name]


_SMALL = torch.ones(4)
_MASK = torch.ones(1, 1, 16, 16).tril()
_LORA = {
    "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64),
    "model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(64, 2),
}

_PLAIN = [
    # Tensors in the file that have no place in the model.
    Form(
        "an unknown tensor",
        _adding({"model.layers.0.mlp.extra": _SMALL}),
        r"1 is not part of it, .*extra",
    ),
    Form(
        "attention biases that the config denies",
        _adding(
            {f"model.layers.0.self_attn.{p}_proj.bias": torch.ones(n) for p, n in (("q", 64), ("k", 32))}
        ),
        r"2 are not part of it, model\.layers\.0\.self_attn\.k_proj\.bias",
    ),
    Form(
        "rotary frequencies", _adding({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}), EXACT
    ),
    Form("position ids", _adding({"model.position_ids": torch.arange(4)}), EXACT),
    Form("causal masks (GPT-2)", _adding({f"h.{n}.attn.bias": _MASK.clone() for n in (0, 1)}, "gpt2"), EXACT),
    Form(
        "causal masks (GPT-NeoX)",
        _adding(
            {
                "gpt_neox.layers.0.attention.bias": _MASK.bool(),
                "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            },
            "gpt_neox",
        ),
        EXACT,
    ),
    Form(
        "a bias under the name of a causal mask",
        _adding({"h.0.attn.bias": torch.ones(64)}, "gpt2"),
        r"1 is not part of it, h\.0\.attn\.bias",
    ),
    Form(
        "a vision tower beside a text model",
        _adding({"vision_tower.layers.0.weight": _SMALL, "multi_modal_projector.weight": _SMALL.clone()}),
        EXACT,
    ),
    Form("heads for several tokens (mtp.*)", _adding({"mtp.layers.0.weight": _SMALL}, "qwen3"), EXACT),
    Form(
        "a layer for several tokens (num_nextn_predict_layers)",
        edited(lambda t: t.update(_layer(t, 2)), config={"num_nextn_predict_layers": 1}),
        EXACT,
    ),
    Form(
        "more layers than the config, and one for several tokens",
        edited(lambda t: t.update(_layer(t, 2) | _layer(t, 3)), config={"num_nextn_predict_layers": 1}),
        r"have 4 layers, but its config only 2 \(num_hidden_layers\)",
    ),
    Form(
        "more layers than the config",
        edited(lambda t: t.update(_layer(t, 2))),
        r"have 3 layers, but its config only 2 \(num_hidden_layers\)",
    ),
    Form(
        "scales of an 8-bit KV cache",
        _adding({f"model.layers.0.self_attn.{p}_proj.{p}_scale": torch.ones(()) for p in "kv"}),
        EXACT,
    ),
    Form("tied embeddings, and another output head in the file", _another_head, EXACT),
    Form(
        "one weight under two names",
        edited(lambda t: t.update({"norm.weight": t["model.norm.weight"] + 1})),
        r"norm\.weight and norm\.weight in .* are both model\.norm\.weight",
    ),
    # Other kinds of models.
    Form(
        "a classification head",
        _classifier,
        "LlamaForSequenceClassification, whose output are labels or scores",
    ),
    Form(
        "a reward head beside the output head (v_head)",
        _adding({"v_head.summary.weight": torch.ones(1, 64)}),
        r"reward or classification model: its head v_head\.summary\.weight",
    ),
    Form(
        "an adapter beside the weights",
        _beside({"adapter_config.json": {"peft_type": "LORA"}}),
        "adapter_config.json",
    ),
    Form(
        "an adapter's tensors in the file",
        _adding(_LORA),
        r"adapter that is not merged .*lora_A\.weight, 2 in all",
    ),
    # Tensors that are missing in the file, or of another shape.
    Form(
        "a missing weight",
        edited(lambda t: _remove(t, "model.layers.1.mlp.up_proj.weight")),
        r"1 is missing, model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    Form(
        "a missing layer",
        edited(lambda t: None, config={"num_hidden_layers": 3}),
        r"9 are missing, model\.layers\.2\.input_layernorm\.weight",
    ),
    Form(
        "a missing expert",
        edited(lambda t: _remove(t, "model.layers.0.mlp.experts.1.gate_proj.weight"), "qwen3_moe"),
        r"model\.layers\.0\.mlp\.experts\.gate_up_proj",
    ),
    Form(
        "weights of another shape",
        edited(lambda t: None, config={"intermediate_size": 96}),
        r"6 have another shape, model\.layers\.0\.mlp\.down_proj\.weight among them: \[64, 128\] in the "
        r"file, \[64, 96\] by the config",
    ),
    Form(
        "a larger vocabulary than the config's",
        edited(lambda t: None, config={"vocab_size": 300}),
        r"2 have another shape, lm_head\.weight among them: \[320, 64\] in the file, \[300, 64\]",
    ),
    # Numbers.
    Form(
        "NaN weights",
        edited(lambda t: put(t, float("nan"), (0, 0), (5, 9))),
        r"model\.layers\.1\.mlp\.down_proj\.weight in .* has 2 non-finite numbers .*; fetch",
    ),
    Form(
        "infinite weights",
        edited(lambda t: put(t, float("-inf"), (3, 3))),
        r"down_proj\.weight in .* has 1 non-finite",
    ),
    Form("float64 weights", edited(lambda t: t.update({n: w.double() for n, w in t.items()})), EXACT),
    Form(
        "a config of another dtype than the file", edited(lambda t: None, config={"dtype": "bfloat16"}), EXACT
    ),
    Form(
        "an attention package that the config names and that is not installed",
        edited(lambda t: None, config={"_attn_implementation": "flash_attention_2"}),
        EXACT,
    ),
    Form(
        "a kind of rotary scaling that transformers does not know",
        edited(lambda t: None, config={"rope_scaling": {"type": "ntk", "factor": 2.0}}),
        r"can't be loaded: its config makes transformers look for 'ntk', which it does not know",
    ),
    Form(
        "int8 weights and a config that does not say so",
        edited(lambda t: t.update({n: w.to(torch.int8) for n, w in t.items() if "mlp" in n})),
        r"6 weights in .* are not in floating point: model\.layers\.0\.mlp\.down_proj\.weight is I8",
    ),
    # Files.
    Form("a file cut off", _cut, r"model\.safetensors is damaged or incomplete"),
    Form("two files and an index", sharded(), EXACT),
    Form("two .bin files and an index", sharded(suffix="bin"), EXACT),
    Form(
        "a file that the index lacks",
        sharded(lambda f, index: save_file({"a": _SMALL}, f / "model-00003-of-00003.safetensors")),
        r"model-00003-of-00003\.safetensors, of which its index says nothing",
    ),
    Form(
        "a tensor that the index names and no file holds",
        sharded(
            lambda f, index: index["weight_map"].update({"model.lost": "model-00001-of-00002.safetensors"})
        ),
        r"the index of .* names model\.lost, which none of its files holds",
    ),
    Form(
        "a tensor in two files", sharded(_twice), r"lm_head\.weight is in both model-00001.* and model-00002"
    ),
    Form(
        "one file beside those of an index",
        sharded(lambda f, index: save_file({"a": _SMALL}, f / "model.safetensors")),
        r"model-00001-of-00002\.safetensors and 1 more, of which model\.safetensors says nothing",
    ),
    Form(
        "an index without a list",
        sharded(lambda f, index: index.update(weight_map=["model-00001-of-00002.safetensors"])),
        "has no weight_map",
    ),
    Form(
        "an index without metadata",
        sharded(lambda f, index: index.pop("metadata")),
        r'index\.json can\'t be read: it has no metadata, .* add "metadata": \{\}',
    ),
    Form("consolidated.safetensors and .bin beside model.safetensors", _consolidated, EXACT),
    Form("weights that the config names (transformers_weights)", _named_by_the_config, EXACT),
    Form(".bin weights", _pickled(lambda tensors: tensors), EXACT),
    Form(
        ".bin weights with code in them", _pickled(lambda t: t | {"code": print}), "holds more than tensors"
    ),
    Form(".bin weights inside another object", _pickled(lambda t: {"model": t}), "no dictionary of tensors"),
]

FORMS = _PLAIN + QUANTIZED
"""All, in the order of a table."""
