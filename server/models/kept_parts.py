"""A packed model as a description and tensors, and made of them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from server.models.fused import Norm
from server.models.quantized.embedding import QuantizedEmbedding
from server.models.quantized.layer import LINEARS, LayerParts, QuantizedLayer
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.model import Config, QuantizedModel
from server.models.quantized.packing import Packed
from server.models.quantized.rotary import RotaryTable
from server.models.quantized.stack import QuantizedStack
from server.models.quantized.workspace import Workspace

_NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")


def parts_of(model: QuantizedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A model, whose rotary angles come from a table, as numbers and names, and its tensors."""
    rotary = model.rotary
    assert isinstance(rotary, RotaryTable)
    tensors = {"inv_freq": rotary.inv_freq, "norm": model.norm.weight}
    layers = [layer for layer in model.decoder.layers if isinstance(layer, QuantizedLayer)]
    return {
        "decoder": [_describe_layer(number, layer, tensors) for number, layer in enumerate(layers)],
        "head": _describe("head", model.head, tensors),
        "embedding": _describe_embedding(model.embedding, model.head, tensors),
        "scaling": rotary.scaling,
        "epsilon": model.norm.epsilon,
        "config": vars(model.config),
    }, tensors


def model_of(parts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> QuantizedModel:
    """The model that ``parts_of`` took apart.

    Raises:
        LookupError: a part is missing.
        TypeError: a part is of another kind.
        ValueError: likewise.
    """
    workspace = Workspace()
    layers = [
        QuantizedLayer(_layer(number, each, tensors), workspace)
        for number, each in enumerate(parts["decoder"])
    ]
    head = _linear("head", parts["head"], tensors)
    model = QuantizedModel(
        embedding=_embedding(parts["embedding"], head, tensors),
        rotary=RotaryTable(tensors["inv_freq"], parts["scaling"]),
        decoder=QuantizedStack(layers),
        norm=_norm(tensors["norm"], parts["epsilon"]),
        head=head,
        config=Config(**parts["config"]),
    )
    return model.eval().requires_grad_(False)


def _describe_layer(number: int, layer: QuantizedLayer, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    norms: list[Any] = list(layer.norms)
    tensors |= {f"{number}.{name}": norm.weight for name, norm in zip(_NORMS, norms, strict=False)}
    return {
        "index": layer.layer_idx,
        "heads": layer.heads,
        "features": layer.features,
        "epsilons": [norm.epsilon for norm in norms],
        "linears": {
            name: _describe(f"{number}.{name}", linear, tensors)
            for name, linear in zip(LINEARS, layer.linears, strict=True)
        },
    }


def _layer(number: int, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> LayerParts:
    query_heads, kv_heads, size = about["heads"]
    named = zip(_NORMS, about["epsilons"], strict=False)
    linears = about["linears"]
    return LayerParts(
        about["index"],
        about["features"],
        (query_heads, kv_heads, size),
        [_norm(tensors[f"{number}.{name}"], epsilon) for name, epsilon in named],
        [_packed_linear(f"{number}.{name}", linears[name], tensors) for name in LINEARS],
    )


def _describe(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    tensors |= {f"{name}.{part}": tensor for part, tensor in linear.state_dict().items()}
    about = {"inputs": linear.in_features, "outputs": linear.out_features}
    return about | (
        {"bits": linear.bits, "exact": linear.exact} if isinstance(linear, QuantizedLinear) else {}
    )


def _linear(
    name: str, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> QuantizedLinear | nn.Linear:
    """Packed, or of floats."""
    if "bits" in about:
        return _packed_linear(name, about, tensors)
    bias = tensors.get(f"{name}.bias")
    linear = nn.Linear(about["inputs"], about["outputs"], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(tensors[f"{name}.weight"], requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _packed_linear(
    name: str, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> QuantizedLinear:
    packed = Packed(about["bits"], tensors[f"{name}.codes"], tensors[f"{name}.scales"], about["exact"])
    return QuantizedLinear(packed, about["inputs"], about["outputs"], tensors.get(f"{name}.bias"))


def _describe_embedding(embedding: Any, head: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    about: dict[str, Any] = {"tokens": embedding.num_embeddings, "size": embedding.embedding_dim}
    if not isinstance(embedding, QuantizedEmbedding):
        tied = embedding.weight is head.weight
        if not tied:
            tensors["embedding"] = embedding.weight
        return about | {"tied": tied}
    tied = embedding.codes is getattr(head, "codes", None)
    if not tied:
        tensors |= {"embedding.codes": embedding.codes, "embedding.scales": embedding.scales}
    return about | {"tied": tied, "bits": embedding.bits}


def _embedding(
    about: Mapping[str, Any], head: QuantizedLinear | nn.Linear, tensors: Mapping[str, torch.Tensor]
) -> nn.Module:
    """The output layer's own table where the two are tied."""
    if "bits" not in about:
        return nn.Embedding.from_pretrained(head.weight if about["tied"] else tensors["embedding"])
    if about["tied"]:
        assert isinstance(head, QuantizedLinear)
        packed = Packed(head.bits, head.codes, head.scales, exact=True)
    else:
        packed = Packed(about["bits"], tensors["embedding.codes"], tensors["embedding.scales"], exact=True)
    return QuantizedEmbedding(packed, about["tokens"], about["size"])


def _norm(weight: torch.Tensor, epsilon: float) -> Norm:
    plain = nn.RMSNorm(len(weight), epsilon, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return Norm(plain)
