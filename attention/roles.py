"""Which attention modules an encoder-decoder has, and what they ask, read from one tiny forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attention.backends import UnsupportedError
from attention.forward import LayerCall, attending_with
from attention.types import LayerSpec

# Of the source and of the target; different, so that shapes tell what attends to what.
_SOURCE, _TARGET = 7, 3
# Of the call's features, those that serving honors.
_HONORED = {"scaling", "dropout", "position_bias", "is_causal", "sliding_window", "use_cache"}


@dataclass(frozen=True, slots=True)
class Roles:
    """The attention modules of an encoder-decoder.

    Attributes:
        encoder: those of the encoder that go through transformers' attention interface.
        cross: those by which the decoder attends to the source, one to a layer.
        layers: the decoder's layers, for self-attention and for cross-attention alike.
        biased: the decoder's self-attention adds a bias by distance.
    """

    encoder: frozenset[Any]
    cross: frozenset[Any]
    layers: list[LayerSpec]
    biased: bool


def read_roles(model: Any, layers: int) -> Roles:
    """The roles of a model's attention modules.

    Args:
        model: an encoder-decoder of transformers whose attention implementation is ``longspan``.
        layers: of its decoder.

    Raises:
        UnsupportedError: its decoder does not attend to itself and to the source once per layer, by heads of
            the same sizes, or attends in a way that serving would lose.
    """
    try:
        return _read(model, layers)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be served: {error}; choose another model"
        ) from error


def _read(model: Any, layers: int) -> Roles:
    recorder = _Recorder()
    ids = torch.arange(_SOURCE, device=model.device)[None]
    with attending_with(recorder), torch.inference_mode():
        model(input_ids=ids, decoder_input_ids=ids[:, :_TARGET], use_cache=False)
    own, cross = recorder.found[_TARGET, _TARGET], recorder.found[_TARGET, _SOURCE]
    for what, found in (("itself", own), ("the source", cross)):
        if sorted(spec.index for spec in found.values()) != list(range(layers)):
            raise UnsupportedError(
                f"{len(found)} of its decoder's {layers} layers attend to {what} through transformers' "
                "attention interface"
            )
    specs = sorted(own.values(), key=lambda spec: spec.index)
    if specs != sorted(cross.values(), key=lambda spec: spec.index):
        raise UnsupportedError("its decoder attends to itself and to the source by heads of other sizes")
    if any(spec.query_heads != spec.kv_heads for spec in specs) and recorder.biased & own.keys():
        raise UnsupportedError("its decoder's heads share keys and add a bias by distance")
    encoder = frozenset(recorder.found[_SOURCE, _SOURCE])
    return Roles(encoder, frozenset(cross), specs, bool(recorder.biased & own.keys()))


class _Recorder:
    """Answers attention calls with zeros and notes them.

    Attributes:
        found: the modules with their specs, by the numbers of queries and keys.
        biased: those that add a bias by distance.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], dict[Any, LayerSpec]] = {
            (_SOURCE, _SOURCE): {},
            (_TARGET, _TARGET): {},
            (_TARGET, _SOURCE): {},
        }
        self.biased: set[Any] = set()

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``."""
        module, query, key, value, mask, features = call
        if mask is not None:
            raise UnsupportedError("it gives its attention a mask of its own")
        lost = {name for name, value in features.items() if value is not None and value is not False}
        if given := sorted(lost - _HONORED):
            raise UnsupportedError(f"it attends with {', '.join(given)}, which is not served")
        found = self.found.get((query.shape[2], key.shape[2]))
        if found is None or module in found:
            raise UnsupportedError("a layer of it attends in more ways than to itself and to the source")
        if features.get("sliding_window") and query.shape[2] == _TARGET:
            raise UnsupportedError("its decoder attends within a window, which is not served")
        if hasattr(module, "relative_attention_bias"):
            self.biased.add(module)
        elif (bias := features.get("position_bias")) is not None and bool(bias.any()):
            self.biased.add(module)  # the one of another layer
        scaling = features.get("scaling")
        found[module] = LayerSpec(
            index=-1 if module.layer_idx is None else module.layer_idx,
            query_heads=query.shape[1],
            kv_heads=key.shape[1],
            head_size=query.shape[3],
            value_size=value.shape[3],
            scale=float(query.shape[3] ** -0.5 if scaling is None else scaling),
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
