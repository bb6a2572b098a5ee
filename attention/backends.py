"""From the operator's choice to a pattern and a kernel that work together on this model and machine."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from attention.kernels.base import Kernel
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.full import Full
from attention.types import AttentionBatch, LayerCache, LayerSpec


class UnsupportedError(ValueError):
    """What was asked for cannot work; the message gives all reasons and the nearest choice that does."""


class Backend(NamedTuple):
    """A name that operators know.

    Attributes:
        pattern: ``module:function`` that makes the pattern from its options, imported when chosen.
        kernels: names of the kernels that can compute it, in the order in which ``auto`` tries them.
    """

    pattern: str
    kernels: tuple[str, ...]


BACKENDS: dict[str, Backend] = {
    "full": Backend("attention.patterns.full:Full.from_options", ("sdpa", "reference")),
    "sliding_window": Backend(
        "attention.patterns.sliding_window:SlidingWindow.from_options", ("sdpa", "reference")
    ),
    "sparse": Backend("attention.patterns.sparse:from_options", ("sdpa", "reference")),
}

KERNELS: dict[str, str] = {
    "sdpa": "attention.kernels.sdpa:Sdpa",
    "reference": "attention.kernels.reference:Reference",
}


_FULL = Full()


@dataclass(frozen=True, slots=True)
class Attention:
    """What a deployment runs.

    Attributes:
        backend: what the operator chose.
        pattern: which cached tokens a query may see.
        kernel: what computes it.
        reason: why this kernel, in words.
        layers: the model's attention layers.
    """

    backend: str
    pattern: Pattern
    kernel: Kernel
    reason: str
    layers: tuple[LayerSpec, ...]

    @property
    def options(self) -> dict[str, str]:
        """The options in force, defaults included; with them ``resolve`` gives the same again."""
        family = {} if self.backend == self.pattern.name else {"pattern": self.pattern.name}
        return {**family, **self.pattern.options}

    def pattern_of(self, layer: LayerSpec) -> Pattern:
        """Which cached tokens a query of this layer may see, its own window aside."""
        return _FULL if layer.index in self.pattern.dense_layers else self.pattern

    def expired(self, seq_len: int, page_size: int) -> range:
        """Page indices of a sequence that no layer's query at position ``seq_len`` or later can see.

        What the pattern lets go and what a layer's own window does, as far as all layers agree. Once
        expired, a page stays expired.
        """
        first, stop = 0, seq_len // page_size
        for pattern, window in {(self.pattern_of(layer), layer.window) for layer in self.layers}:
            gone = pattern.expired(seq_len, page_size)
            behind = 0 if window is None else max(0, seq_len - window + 1) // page_size
            if behind >= gone.start:
                gone = range(0, max(behind, gone.stop))
            first, stop = max(first, gone.start), min(stop, gone.stop)
        return range(first, max(first, stop))

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        sinks: torch.Tensor | None = None,
        turned: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer's attention; see ``Kernel.forward`` for shapes."""
        pattern = self.pattern_of(layer)
        if isinstance(pattern, ContentPattern):
            pattern.update(layer, cache, batch)
        return self.kernel.forward(layer, query, cache, batch, pattern, sinks, turned)


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
        dtype: number format of the cache.
        page_size: tokens per page.

    Raises:
        UnsupportedError: a name or option is unknown, or the kernel cannot compute these layers exactly.
    """
    entry = BACKENDS.get(backend)
    if entry is None:
        raise UnsupportedError(_unknown("attention backend", backend, BACKENDS))
    if kernel not in ("auto", *entry.kernels):
        if kernel in KERNELS:
            raise UnsupportedError(
                f"kernel {kernel} does not compute {backend} attention; choose auto or "
                f"{' or '.join(entry.kernels)}"
            )
        raise UnsupportedError(_unknown("attention kernel", kernel, ("auto", *entry.kernels)))
    try:
        pattern: Pattern = _load(entry.pattern)(options)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    if strange := [index for index in pattern.dense_layers if index >= len(layers)]:
        raise UnsupportedError(
            f"dense_layers names layer {strange[0]}, but the model's layers are 0 to {len(layers) - 1}; "
            "choose among these"
        )

    refusals: dict[str, list[str]] = {}
    for name in entry.kernels if kernel == "auto" else (kernel,):
        candidate: Kernel = _load(KERNELS[name])()
        reasons = candidate.unsupported(layers, torch.device(device), dtype, page_size, pattern)
        if not reasons:
            reason = _reason(name, kernel, entry.kernels, refusals)
            return Attention(backend, pattern, candidate, reason, tuple(layers))
        refusals[name] = reasons
    message = "; ".join(reason for reasons in refusals.values() for reason in reasons)
    if kernel != "auto":
        try:
            nearest = resolve(backend, options, "auto", layers, device, dtype, page_size).kernel.name
        except UnsupportedError as error:
            raise UnsupportedError(f"no kernel can compute {backend} attention here: {error}") from None
        message += f"; choose kernel {nearest} or auto"
    raise UnsupportedError(message)


def _reason(name: str, asked: str, order: tuple[str, ...], refusals: dict[str, list[str]]) -> str:
    if asked != "auto":
        return "asked for"
    if refusals:
        return "; ".join(reason for reasons in refusals.values() for reason in reasons)
    return f"first of {', '.join(order)} that can"


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"there is no {what} {name!r}; choose {' or '.join(choices)}{hint}"


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return attrgetter(name)(import_module(module))
