"""From the operator's choice to a pattern and a kernel that work together on this model and machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attention.choice import Choice, Place, pattern_of, selectable
from attention.kernels.base import Kernel
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.full import Full
from attention.registry import Backend, Registry, UnsupportedError, unknown
from attention.types import AttentionBatch, LayerCache, LayerSpec

__all__ = [
    "BACKENDS",
    "KERNELS",
    "Attention",
    "Backend",
    "UnsupportedError",
    "check_names",
    "make_pattern",
    "registries",
    "resolve",
]

# The order of the kernels is that in which auto tries them: kernels that read pages in place come before
# sdpa, which gathers them at every step.
BACKENDS: dict[str, Backend] = {
    "full": Backend(
        "attention.patterns.full:Full.from_options",
        ("cpu_paged", "flash_attn", "triton", "sdpa", "reference"),
    ),
    "flash": Backend(
        "attention.patterns.full:Full.from_options",
        ("cpu_paged", "flash_attn", "varlen", "sdpa_flash", "triton"),
    ),
    "xformers": Backend("attention.patterns.full:Full.from_options", ("xformers",)),
    "sliding_window": Backend(
        "attention.patterns.sliding_window:SlidingWindow.from_options",
        ("cpu_paged", "flash_attn", "triton", "sdpa", "reference"),
    ),
    "sparse": Backend(
        "attention.patterns.sparse:from_options",
        ("cpu_paged", "triton", "sdpa", "reference"),
        family="attention.patterns.sparse:PATTERNS",
    ),
}

KERNELS: dict[str, str] = {
    "cpu_paged": "attention.kernels.cpu.paged:CpuPaged",
    "triton": "attention.kernels.triton_paged:Triton",
    "sdpa": "attention.kernels.sdpa:Sdpa",
    "reference": "attention.kernels.reference:Reference",
    "flash_attn": "attention.kernels.flash_attn:FlashAttn",
    "varlen": "attention.kernels.varlen:Varlen",
    "sdpa_flash": "attention.kernels.sdpa_flash:SdpaFlash",
    "xformers": "attention.kernels.xformers:Xformers",
}


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
    """What a deployment runs.

    Attributes:
        backend: what the operator chose.
        pattern: which cached tokens a query may see.
        kernel: what computes it.
        reason: why this kernel, in words.
        layers: the model's attention layers.
        family: the backend has several patterns, which its option ``pattern`` chooses among.
        kinds: the layers by what their queries see.
    """

    backend: str
    pattern: Pattern
    kernel: Kernel
    reason: str
    layers: tuple[LayerSpec, ...]
    family: bool = False
    kinds: tuple[Alike, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        alike: dict[tuple[bool, int | None], list[LayerSpec]] = {}
        for layer in self.layers:
            alike.setdefault((layer.index in self.pattern.dense_layers, layer.window), []).append(layer)
        kinds = (
            Alike(self.pattern_of(layers[0]), window, tuple(layer.index for layer in layers))
            for (_, window), layers in alike.items()
        )
        object.__setattr__(self, "kinds", tuple(kinds))

    @property
    def options(self) -> dict[str, str]:
        """The options in force, defaults included; with them ``resolve`` gives the same again."""
        member = {"pattern": self.pattern.name} if self.family else {}
        return {**member, **self.pattern.options}

    def pattern_of(self, layer: LayerSpec) -> Pattern:
        """Which cached tokens a query of this layer may see, its own window aside."""
        return _FULL if layer.index in self.pattern.dense_layers else self.pattern

    @property
    def ruled_layers(self) -> list[tuple[LayerSpec, Pattern]]:
        """Each layer with the pattern of its queries."""
        return [(layer, self.pattern_of(layer)) for layer in self.layers]

    def expired(self, seq_len: int, page_size: int) -> range:
        """Page indices of a sequence that no layer's query at position ``seq_len`` or later can see.

        What the pattern lets go and what a layer's own window does, as far as all layers agree. Once
        expired, a page stays expired.
        """
        first, stop = 0, seq_len // page_size
        for pattern, window, _ in self.kinds:
            gone = pattern.expired(seq_len, page_size)
            behind = 0 if window is None else max(0, seq_len - window + 1) // page_size
            if behind >= gone.start:
                gone = range(0, max(behind, gone.stop))
            first, stop = max(first, gone.start), min(stop, gone.stop)
        return range(first, max(first, stop))

    def needs_host(self) -> str | None:
        """Why steps of which the device alone knows can't be computed, if so; see ``Kernel.needs_host``."""
        reasons = (self.kernel.needs_host(pattern) for pattern, _, _ in self.kinds)
        return next(filter(None, reasons), None)

    def write(self, cache: LayerCache, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores a step's keys and values; see ``LayerCache.write``."""
        self.kernel.write(cache, slots, key, value)

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        sinks: torch.Tensor | None = None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer's attention; see ``Kernel.forward`` for shapes."""
        pattern = self.pattern_of(layer)
        if isinstance(pattern, ContentPattern):
            self.kernel.update(layer, cache, batch, pattern)
        return self.kernel.forward(layer, query, cache, batch, pattern, sinks, rerotated)


def resolve(
    backend: str,
    options: Mapping[str, str],
    kernel: str,
    layers: list[LayerSpec],
    device: torch.device | str,
    dtype: torch.dtype,
    page_size: int,
) -> Attention:
    """Chooses pattern and kernel, or says why that cannot be.

    Args:
        backend: a name from ``BACKENDS``.
        options: the backend's details, as text.
        kernel: a name from ``KERNELS``, or ``auto`` for the backend's first that can compute the layers.
        layers: the model's attention layers.
        device: where the cache lives.
        dtype: dtype of the cache.
        page_size: tokens per page.

    Raises:
        UnsupportedError: a name or option is unknown, or the kernel cannot compute these layers exactly.
    """
    place = Place(layers, torch.device(device), dtype, page_size)
    choice = Choice(*registries(), backend, options, place)
    if kernel not in ("auto", *choice.selectable):
        raise UnsupportedError(_not_of_the_backend(kernel, backend, choice.selectable))
    refusals: list[str] = []
    for name in choice.order if kernel == "auto" else (kernel,):
        reasons = choice.reasons(name)
        if not reasons:
            reason = "asked for" if kernel == name else _picked(choice.order, refusals)
            made = choice.kernel(name)
            return Attention(backend, choice.pattern, made, reason, tuple(layers), choice.family)
        refusals += reasons
    if kernel == "auto":
        refusals[0] = f"no kernel can compute {backend} attention here: {refusals[0]}"
    raise UnsupportedError("; ".join([*refusals, choice.nearest(None if kernel == "auto" else kernel)]))


def make_pattern(backend: str, options: Mapping[str, str]) -> Pattern:
    """What ``resolve`` would choose as the pattern, for when there is no model yet.

    Raises:
        UnsupportedError: a name or option is unknown.
    """
    return pattern_of(registries()[0], backend, options)


def check_names(backend: str, options: Mapping[str, str], kernel: str) -> None:
    """What ``resolve`` refuses without looking at a model or a machine.

    Args:
        backend: as of ``resolve``.
        options: as of ``resolve``.
        kernel: as of ``resolve``.

    Raises:
        UnsupportedError: a name or option is unknown, or the kernel is not one of the backend's.
    """
    backends, kernels = registries()
    pattern_of(backends, backend, options)
    names = selectable(backends, kernels, backend)
    if kernel not in ("auto", *names):
        raise UnsupportedError(_not_of_the_backend(kernel, backend, names))


def registries() -> tuple[Registry, Registry]:
    """All backends and all kernels there are, those of installed packages included."""
    return Registry("backend", BACKENDS), Registry("kernel", KERNELS)


def _picked(order: tuple[str, ...], refusals: list[str]) -> str:
    passed = f": {'; '.join(refusals)}" if refusals else ""
    return f"first of {', '.join(order)} that can{passed}"


def _not_of_the_backend(kernel: str, backend: str, names: list[str]) -> str:
    if kernel not in KERNELS:
        return unknown("attention kernel", kernel, ("auto", *names))
    ways = ["kernel auto", *names]
    ways += [f"attention {name}" for name, entry in BACKENDS.items() if kernel in entry.kernels]
    return f"kernel {kernel} does not compute {backend} attention; choose {' or '.join(ways)}"
