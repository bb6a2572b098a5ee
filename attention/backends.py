"""Resolves the operator's settings to a pattern and a kernel that work with this model on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from attention.batch import AttentionBatch
from attention.kernel_choice import KernelChoice, Place, pattern_of
from attention.kernels.base import Kernel, Kind
from attention.kernels.step_plans import StepPlans
from attention.names import check_kernel, registries
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.full import Full
from attention.registry import UnsupportedError
from attention.step import DeviceBatch
from attention.types import LayerCache, LayerSpec

__all__ = ["Attention", "UnsupportedError", "make_pattern", "resolve"]

_FULL = Full()


class Alike(NamedTuple):
    """Layers whose queries see the same keys.

    Attributes:
        pattern: the rule in force.
        window: their own sliding window, or ``None``.
        layers: their indices.
    """

    pattern: Pattern
    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """The pattern and kernel of a deployment.

    Attributes:
        backend: its name, as the operator gave it.
        pattern: which cached tokens a query may see.
        kernel: the chosen kernel.
        reason: of the kernel choice, in words.
        layers: the model's attention layers.
        family: the backend has several patterns, one of which its option ``pattern`` names.
        alike: the layers by what their queries see.
    """

    backend: str
    pattern: Pattern
    kernel: Kernel[Any]
    reason: str
    layers: tuple[LayerSpec, ...]
    family: bool = False
    alike: tuple[Alike, ...] = field(init=False, repr=False, compare=False)
    _indexless: dict[int, LayerSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        alike: dict[tuple[bool, int | None], list[LayerSpec]] = {}
        for layer in self.layers:
            alike.setdefault((layer.index in self.pattern.dense_layers, layer.window), []).append(layer)
        groups = (
            Alike(self.pattern_of(layers[0]), window, tuple(layer.index for layer in layers))
            for (_, window), layers in alike.items()
        )
        object.__setattr__(self, "alike", tuple(groups))
        specs = {layer.index: replace(layer, index=0) for layer in self.layers}
        object.__setattr__(self, "_indexless", specs)

    @property
    def options(self) -> dict[str, str]:
        """The options in force, defaults included; with them ``resolve`` gives the same again."""
        member = {"pattern": self.pattern.name} if self.family else {}
        return {**member, **self.pattern.options}

    def pattern_of(self, layer: LayerSpec) -> Pattern:
        """The pattern of this layer's queries; the layer's own window applies as well."""
        return _FULL if layer.index in self.pattern.dense_layers else self.pattern

    @property
    def ruled_layers(self) -> list[tuple[LayerSpec, Pattern]]:
        """Each layer with the pattern of its queries."""
        return [(layer, self.pattern_of(layer)) for layer in self.layers]

    def expired(self, seq_len: int, page_size: int) -> range:
        """Page indices of a sequence that no layer's query at position ``seq_len`` or later can see.

        Those of the pattern, and those behind a layer's own window, as far as all layers agree. Once expired,
        a page stays expired.
        """
        first, stop = 0, seq_len // page_size
        for pattern, window, _ in self.alike:
            own = pattern.expired(seq_len, page_size)
            behind = 0 if window is None else max(0, seq_len - window + 1) // page_size
            if behind >= own.start:
                own = range(0, max(behind, own.stop))
            first, stop = max(first, own.start), min(stop, own.stop)
        return range(first, max(first, stop))

    def plans(self, batch: AttentionBatch | DeviceBatch) -> StepPlans[Any]:
        """The plans that a step's layers share, to be passed to each ``forward`` of the step."""
        return StepPlans(self.kernel, batch)

    def write(self, cache: LayerCache, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores a step's keys and values; see ``LayerCache.write``."""
        self.kernel.write(cache, slots, key, value)

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plans: StepPlans[Any],
        sinks: torch.Tensor | None = None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer's attention; see ``Kernel.forward`` for shapes, and ``plans`` for the step's."""
        pattern = self.pattern_of(layer)
        if isinstance(pattern, ContentPattern):
            self.kernel.update(layer, cache, plans.written, pattern)
        kind = Kind(self._indexless[layer.index], pattern, query.dtype, cache.keys.dtype)
        output: torch.Tensor = self.kernel.forward(layer, query, cache, plans.of(kind), sinks, rerotated)
        return output


def resolve(
    backend: str,
    options: Mapping[str, str],
    kernel: str,
    layers: list[LayerSpec],
    device: torch.device | str,
    dtype: torch.dtype,
    page_size: int,
    *,
    round_products: bool = False,
) -> Attention:
    """Makes the pattern and chooses the kernel, or says why that is impossible.

    Args:
        backend: a name from ``attention.names.BACKENDS``.
        options: the backend's details, as text.
        kernel: a name from ``attention.names.KERNELS``, or ``auto`` for the backend's first that can compute
            the layers.
        layers: the model's attention layers.
        device: where the cache lives.
        dtype: dtype of the cache.
        page_size: tokens per page.
        round_products: the kernel may compute prompts by products of 16 bits where it has them; see
            ``Kernel.with_rounded_products``.

    Raises:
        UnsupportedError: a name or option is unknown, or the kernel cannot compute these layers exactly.
    """
    place = Place(layers, torch.device(device), dtype, page_size)
    choice = KernelChoice(*registries(), backend, options, place)
    check_kernel(kernel, backend, choice.selectable)
    refusals: list[str] = []
    for name in choice.order if kernel == "auto" else (kernel,):
        reasons = choice.reasons(name)
        if not reasons:
            reason = "asked for" if kernel == name else _picked(choice.order, refusals)
            made = choice.kernel(name)
            if round_products:
                made = made.with_rounded_products()
            if products := made.products(dtype):
                reason += f"; prompts in products of {products}"
            return Attention(backend, choice.pattern, made, reason, tuple(layers), choice.family)
        refusals += reasons
    if kernel == "auto":
        refusals[0] = f"no kernel can compute {backend} attention here: {refusals[0]}"
    raise UnsupportedError("; ".join([*refusals, choice.nearest(None if kernel == "auto" else kernel)]))


def make_pattern(backend: str, options: Mapping[str, str]) -> Pattern:
    """The pattern that ``resolve`` would make; needs no model.

    Raises:
        UnsupportedError: a name or option is unknown.
    """
    return pattern_of(registries()[0], backend, options)


def _picked(order: tuple[str, ...], refusals: list[str]) -> str:
    passed = f": {'; '.join(refusals)}" if refusals else ""
    return f"first of {', '.join(order)} that can{passed}"
