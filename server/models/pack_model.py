"""Builds a packed model from a model of transformers whose layers are all of the common shape."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from server.models.fused import FusedLayer, Norm, NotCommonError
from server.models.loaded import LoadedModel
from server.models.prove_packed import prove_head, prove_layer, prove_stack
from server.models.quantize import Weights, obstacle, packed_weights, said_of
from server.models.quantized.embedding import packed_embedding
from server.models.quantized.layer import LINEARS, LayerParts, QuantizedLayer
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.model import Config, QuantizedModel
from server.models.quantized.packing import Packed
from server.models.quantized.rotary import OwnRotary, RotaryTable
from server.models.quantized.stack import QuantizedStack
from server.models.quantized.workspace import Workspace
from server.models.recognize_layers import Recognition, close

log = logging.getLogger("longspan.models")

# By name, since importing the one of transformers takes longer than all else in a start.
_SILU = ("SiLU", "SiLUActivation")

# Kinds of rotary embedding whose frequencies never change.
_STEADY = ("default", "linear", "llama3", "yarn")


def pack_model(
    loaded: LoadedModel, recognition: Recognition, weights: Weights
) -> tuple[LoadedModel, str] | str:
    """The same model in the executor's own layout, and the form of its decoder's weights, like ``int4``.

    Each part is compared with what the model did with the tokens of ``recognition``, and each packed layer
    with its float weights. The model itself stays as it is.

    Args:
        loaded: the model; only on a CPU there is such a layout.
        recognition: of its layers.
        weights: how to pack.

    Returns:
        Where the model is not of parts that go into it, why, as part of a sentence.

    Raises:
        RefusedError: a packed layer computes something else than its weights do.
    """
    if loaded.model.device.type != "cpu":
        return f"it is on {loaded.model.device.type}, and only a CPU computes packed models"
    if weights == "float":
        return "its weights are to stay floats"
    if (reason := obstacle(loaded.model, weights)) is not None:
        return reason
    try:
        return _Parts(loaded, recognition).pack(weights)
    except (NotCommonError, AttributeError, ValueError) as error:
        return str(error)


class _Parts:
    """A model's parts, each of them proven.

    Raises:
        NotCommonError: it has others.
    """

    def __init__(self, loaded: LoadedModel, recognition: Recognition) -> None:
        self.loaded, self.recognition, self.layers = loaded, recognition, recognition.layers
        if len(self.layers) != len(loaded.layers):
            raise NotCommonError(
                f"{len(self.layers)} of its {len(loaded.layers)} decoder layers are of Llama's form"
            )
        model = loaded.model
        base: Any = model.get_decoder()
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(self.embedding) is not nn.Embedding or type(self.head) is not nn.Linear:
            kinds = type(self.embedding).__name__, type(self.head).__name__
            raise NotCommonError(f"its embedding is a {kinds[0]}, its output layer a {kinds[1]}")
        if getattr(base, "norm", None) is None:
            raise NotCommonError(f"{type(base).__name__} has no norm after its layers")
        self.norm, self.rotary = Norm(base.norm), self._rotary(base)
        self._check()

    def _rotary(self, base: nn.Module) -> RotaryTable | OwnRotary:
        modules = [module for module in base.modules() if hasattr(module, "inv_freq")]
        if len(modules) != 1:
            raise NotCommonError(f"it has {len(modules)} kinds of rotary angles")
        own: Any = modules[0]
        if self.loaded.rope is not None or getattr(own, "rope_type", None) not in _STEADY:
            return OwnRotary(own)
        table = RotaryTable(own.inv_freq.float(), float(own.attention_scaling))
        last = self.loaded.context_length - 1
        positions = torch.tensor([0, 1, last // 3, last])
        if not all(map(close, table.computed(positions), OwnRotary(own).at(positions)[:2])):
            raise NotCommonError("its rotary angles are not those of a table")
        return table

    def _check(self) -> None:
        """Proves that there is nothing else between these parts."""
        found, layers = self.recognition, self.layers
        with torch.inference_mode():
            states = [self.embedding(found.ids), *(each.output[0] for each in layers)]
            angles = self.rotary.at(found.positions).by_token()
            logits = self.head(self.norm(states[-1][:1]))
        if not all(
            torch.equal(each.input[0], before) for each, before in zip(layers, states[:-1], strict=True)
        ):
            raise NotCommonError("something is computed between its embedding and its layers")
        if not all(map(close, angles * len(layers), (part for each in layers for part in each.angles))):
            raise NotCommonError("its layers have rotary angles of several kinds")
        if not close(logits, found.logits):
            raise NotCommonError("something is computed after its last norm or its output layer")
        shapes = {(each.fused.query_heads, each.fused.kv_heads, each.fused.head_size) for each in layers}
        if len(shapes) > 1:
            raise NotCommonError("its layers have heads of several shapes")
        if strange := {type(each.fused.activation).__name__ for each in layers}.difference(_SILU):
            raise NotCommonError(f"its activation is {', '.join(sorted(strange))}")
        if any(len({norm.epsilon for norm in each.fused.head_norms}) > 1 for each in layers):
            raise NotCommonError("the norms of its queries and keys differ in epsilon")

    def pack(self, weights: Weights) -> tuple[LoadedModel, str]:
        """Packs and proves layer by layer, so that no more than one's float weights are ever there twice."""
        workspace = Workspace()
        layers: list[QuantizedLayer] = []
        linears: list[QuantizedLinear] = []
        for each in self.layers:
            parts = self._layer_parts(each.fused, weights)
            layers.append(QuantizedLayer(parts, workspace))
            prove_layer(each.fused, layers[-1], (each.angles[0][0], each.angles[1][0]))
            linears += parts.linears
        forms = "+".join(f"int{bits}" for bits in sorted({linear.bits for linear in linears}))
        stack = QuantizedStack(layers)
        prove_stack(stack, self.layers[0].input[0], self.rotary.at(self.recognition.positions))
        head, embedding = self._head(weights), self.embedding
        if isinstance(head, QuantizedLinear):
            linears.append(head)
            packed = Packed(head.bits, head.codes, head.scales, head.exact)
            embedding = packed_embedding(self.embedding, packed)
            if not torch.equal(embedding(self.recognition.ids), self.layers[0].input[0]):
                raise NotCommonError("its embedding does more than to look up")
        text = self.loaded.model.config.get_text_config(decoder=True)
        values = {name: getattr(text, name) for name in Config.NAMES if getattr(text, name, None) is not None}
        model = QuantizedModel(embedding, self.rotary, stack, self.norm, head, Config(**values)).eval()
        log.info(
            "weights are %s, those of the output layer %s: of its linear layers %s",
            forms,
            f"int{head.bits}" if isinstance(head, QuantizedLinear) else "float32",
            said_of(linears, kept=int(head is self.head)),
        )
        return replace(self.loaded, model=model), forms

    def _layer_parts(self, fused: FusedLayer, weights: Weights) -> LayerParts:
        linears = []
        for name in LINEARS:
            plain: Any = getattr(fused, name)
            packed = packed_weights(plain.weight, weights, is_head=False)
            if packed is None:
                raise NotCommonError(
                    f"{name} of layer {fused.layer_idx} has weights that groups of 32 in 4 or 8 bits don't "
                    "hold exactly"
                )
            linears.append(QuantizedLinear(packed, plain.in_features, plain.out_features, plain.bias))
        norms: list[Any] = [fused.attention_norm, fused.mlp_norm, *fused.head_norms]
        heads = fused.query_heads, fused.kv_heads, fused.head_size
        return LayerParts(fused.layer_idx, fused.features, heads, norms, linears)

    def _head(self, weights: Weights) -> QuantizedLinear | nn.Linear:
        plain = self.head
        packed = packed_weights(plain.weight, weights, is_head=True)
        if packed is None:
            return plain
        head = QuantizedLinear(packed, plain.in_features, plain.out_features, plain.bias)
        prove_head(self.norm, plain, head)
        return head
