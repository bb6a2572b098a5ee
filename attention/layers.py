"""Reads the specs of a model's attention layers from two tiny forwards; refuses what serving would lose.

Most of a layer's requirements are arguments of its attention call. The others are only in masks, which the
paged cache does not take: so the masks that the model would build are compared with the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from attention.backends import UnsupportedError
from attention.forward import LayerCall, forward
from attention.kernels.base import layer_ranges
from attention.types import LayerSpec

IMPLEMENTATION = "longspan"

# Arguments that may be tensors: they change nothing about attention, or serving honors them.
_HARMLESS = {"position_ids", "logits_to_keep", "s_aux"}

KNOWN_TYPES = ("full_attention", "sliding_attention")
"""The names in configs of layers that keep only keys and values."""

_TOKENS = 40


def read_layers(model: Any) -> list[LayerSpec]:
    """One ``LayerSpec`` per attention layer, in order.

    Args:
        model: a causal language model of transformers whose attention implementation is ``longspan``
            (``attention.hook.register()``, then ``model.set_attn_implementation("longspan")``).

    Raises:
        UnsupportedError: the model's attention does not go through transformers' attention interface as
            a decoder's, once per layer, or has structure that serving would lose.
    """
    try:
        return _read(model)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be served: {error}; choose another model"
        ) from error


def strange_types(config: Any) -> list[str]:
    """Kinds of layers in a text model's config that keep anything else than keys and values."""
    return sorted(set(filter(None, getattr(config, "layer_types", None) or [])) - set(KNOWN_TYPES))


def _read(model: Any) -> list[LayerSpec]:
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError("it is an encoder-decoder model")
    config = model.config.get_text_config(decoder=True)
    # In the decoder of an encoder-decoder model, num_hidden_layers is the encoder's.
    count = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    if count is None:
        raise UnsupportedError("it is made of several transformers, and its config has no number of layers")
    types = getattr(config, "layer_types", None) or [None] * count
    if strange := strange_types(config):
        raise UnsupportedError(f"the paged cache would lose the structure of its {', '.join(strange)} layers")
    window = getattr(config, "sliding_window", None) or None
    tokens = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)

    serving = _Recorder()
    _forward(model, torch.arange(tokens).repeat(2), serving)
    if sorted(serving.layers) != list(range(count)):
        raise UnsupportedError(
            f"{len(serving.layers)} of its {count} layers go through transformers' attention interface"
        )
    if serving.masked:
        raise UnsupportedError(f"{layer_ranges(serving.masked)} use a mask even where none is asked for")
    if not serving.repeats:
        raise UnsupportedError("it does not follow position_ids, so that sequences cannot share a batch")

    positions = _probe_positions(window, tokens)
    probing = _Recorder(positions, window)
    with _masks_at(positions):
        _forward(model, torch.arange(len(positions)), probing)
    layers = [probing.layers[index] for index in range(count)]
    lost = {layer.index: layer for layer in probing.masked}
    for layer, kind in zip(layers, types, strict=True):
        if kind == "sliding_attention" and layer.window != window:
            lost[layer.index] = layer
    if lost:
        raise UnsupportedError(
            f"the mask of {layer_ranges(list(lost.values()))} and the arguments of the attention call differ "
            "on which tokens are visible"
        )
    return layers


def _forward(model: Any, positions: torch.Tensor, recorder: _Recorder) -> None:
    """Runs the model on tokens that follow from their ``positions`` ``[T]``."""
    at = positions.to(next(model.parameters()).device)
    try:
        with torch.inference_mode():
            forward(
                model,
                at % model.config.get_text_config(decoder=True).vocab_size,
                at,
                recorder,
                torch.tensor([len(positions) - 1], device=at.device),
            )
    except UnsupportedError:
        raise
    except Exception as error:
        # A model that was not made for the interface can raise anything.
        raise UnsupportedError(f"its forward fails with {type(error).__name__}: {error}") from error


class _Recorder:
    """Answers attention calls with plain causal attention, so that values stay finite, and notes them.

    Args:
        positions: ``[T]``, for which the model builds its masks; ``None`` if it must build no mask.
        window: the window that a mask may show without an argument for it.

    Attributes:
        layers: by index.
        masked: those whose mask does not follow from causality and a window.
        repeats: the first layer's keys in the second half of the tokens equal those in the first half.
    """

    def __init__(self, positions: torch.Tensor | None = None, window: int | None = None) -> None:
        self.positions = positions
        self.window = window
        self.layers: dict[int, LayerSpec] = {}
        self.masked: list[LayerSpec] = []
        self.repeats = True

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``."""
        module, query, key, value, mask, features = call
        layer = _spec(module, query, key, value, features)
        if layer.index in self.layers:
            raise UnsupportedError(f"layer {layer.index} calls attention more than once per forward")
        if mask is not None:
            if layer.window is None and self._follows(self.window, mask):
                layer = replace(layer, window=self.window)
            elif not self._follows(layer.window, mask):
                self.masked.append(layer)
        if layer.index == 0:
            if bool(key.isnan().any()):
                raise UnsupportedError(
                    "its first layer's keys are NaN: a number in its weights or config, such as "
                    "the base of its rotary embeddings, is not one that can be computed with"
                )
            first, second = key.float().chunk(2, dim=2)
            self.repeats = first.shape == second.shape and torch.allclose(
                first, second, rtol=0, atol=0.02 * float(first.abs().max())
            )
        self.layers[layer.index] = layer
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=layer.scale, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous()

    def _follows(self, window: int | None, mask: torch.Tensor) -> bool:
        """Whether the mask is exactly that of causality and the window."""
        if self.positions is None or mask.dtype != torch.bool:
            return False
        queries, keys = self.positions[:, None], self.positions
        expected = keys <= queries
        if window is not None:
            expected &= queries - keys < window
        return torch.equal(mask.cpu(), expected[None, None])


def _spec(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    features: Mapping[str, Any],
) -> LayerSpec:
    """The spec of a layer from one of its attention calls."""
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise UnsupportedError(f"{type(module).__name__} does not know its layer's index")
    causal = features.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedError(f"layer {index} is not causal")
    if key.shape[2] != query.shape[2]:
        raise UnsupportedError(f"layer {index} attends to something else than its own tokens")
    for name, argument in features.items():
        if isinstance(argument, torch.Tensor) and name not in _HARMLESS:
            raise UnsupportedError(f"layer {index} attends with {name}, which no kernel supports")
    scaling = features.get("scaling")
    return LayerSpec(
        index=index,
        query_heads=query.shape[1],
        kv_heads=key.shape[1],
        head_size=query.shape[3],
        value_size=value.shape[3],
        scale=float(query.shape[3] ** -0.5 if scaling is None else scaling),
        window=features.get("sliding_window") or None,
        softcap=features.get("softcap") or None,
        sinks=features.get("s_aux") is not None,
    )


def _probe_positions(window: int | None, tokens: int) -> torch.Tensor:
    """At most ``tokens`` positions at short and long distances, some exactly a window apart."""
    around = [1, window - 1, window, window + 1, 2 * window] if window else []
    powers = [position for k in range(20) for position in (2**k, 2**k + 1)]
    return torch.tensor(sorted([0, *dict.fromkeys([n for n in [*around, *powers] if n > 0])][:tokens]))


class _TokensAt(TorchFunctionMode):
    """Lets mask functions look up properties of tokens, like the image that a token is part of, by position.

    Args:
        positions: of the tokens, ascending.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        super().__init__()
        self.positions = positions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Queries and keys are the indices of two dimensions."""
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            tensor, index = args
            args = (
                tensor,
                tuple(self._token(i) if isinstance(i, torch.Tensor) and i.ndim else i for i in index),
            )
        return func(*args, **(kwargs or {}))

    def _token(self, position: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.positions, position)


@contextmanager
def _masks_at(positions: torch.Tensor) -> Iterator[None]:
    """Lets models build their masks as if their tokens had these ``positions``.

    Without a mask function of the implementation's name transformers builds no masks, which serving relies
    on; so the function is registered for one forward only.
    """
    from transformers.masking_utils import AttentionMaskInterface

    def build(*, mask_function: Any, device: torch.device, **_: Any) -> torch.Tensor:
        at = positions.to(device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        with _TokensAt(at):
            visible: torch.Tensor = mask_function(zero, zero, at[:, None], at[None])
        return visible.expand(len(at), len(at))[None, None]

    AttentionMaskInterface.register(IMPLEMENTATION, build)
    try:
        yield
    finally:
        AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION, None)
