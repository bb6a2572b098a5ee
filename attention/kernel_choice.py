"""Which kernels can compute a backend on a model and a machine, and the nearest alternative if none can."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

import torch

from attention.kernels.base import Kernel
from attention.names import load_backend, order, selectable
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.registry import Registry, UnsupportedError, described, imported
from attention.types import LayerSpec

_PAGE_SIZES = [2**n for n in range(11)]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FULL = Full()


class Place(NamedTuple):
    """Where attention is to run.

    Attributes:
        layers: the model's attention layers.
        device: where the cache lives.
        dtype: dtype of the cache.
        page_size: tokens per page.
    """

    layers: list[LayerSpec]
    device: torch.device
    dtype: torch.dtype
    page_size: int


class KernelChoice:
    """One backend's pattern, made from its options, and the kernels that may compute it.

    Args:
        backends: all backends.
        kernels: all kernels.
        backend: the name of one.
        options: its details, as text.
        place: where it is to run.

    Attributes:
        pattern: which cached tokens a query may see.
        order: names of kernels, in the order in which ``auto`` tries them.
        family: the backend has several patterns, one of which the option ``pattern`` names.

    Raises:
        UnsupportedError: a name or option is unknown, or its package is broken.
    """

    def __init__(
        self, backends: Registry, kernels: Registry, backend: str, options: Mapping[str, str], place: Place
    ) -> None:
        self._backends, self._kernels = backends, kernels
        self._loaded: dict[str, Kernel] = {}
        self.backend, self.place = backend, place
        entry = load_backend(backends, backend)
        self.order = order(backends, backend)
        self.family = entry.family is not None
        self.pattern = pattern_of(backends, backend, options)
        if strange := [index for index in self.pattern.dense_layers if index >= len(place.layers)]:
            raise UnsupportedError(
                f"dense_layers names layer {strange[0]}, but the model's layers are 0 to "
                f"{len(place.layers) - 1}; choose among these"
            )

    @property
    def options(self) -> dict[str, str]:
        """The options in force, defaults included; with them the backend gives the same pattern again."""
        member = {"pattern": self.pattern.name} if self.family else {}
        return {**member, **self.pattern.options}

    @property
    def selectable(self) -> list[str]:
        """Kernels that may be asked for by name: those of the order, and those of installed packages."""
        return selectable(self._backends, self._kernels, self.backend)

    def kernel(self, name: str) -> Kernel:
        """The kernel of this name, made once.

        Raises:
            UnsupportedError: it cannot be made; the sentence says why.
        """
        if name not in self._loaded:
            origin = self._kernels.origin(name)
            try:
                kernel = self._kernels.load(name)()
            except UnsupportedError:
                raise
            except Exception as error:  # for example, a package that it needs is there but broken
                raise UnsupportedError(f"kernel {name} cannot be loaded: {described(error)}") from error
            if not isinstance(kernel, Kernel) or kernel.name != name:
                raise UnsupportedError(
                    f"kernel {name} of {origin or 'Longspan'} is not a class derived from "
                    f"attention.kernels.base.Kernel with the name {name!r}"
                )
            self._loaded[name] = kernel
        return self._loaded[name]

    def reasons(self, kernel: str, place: Place | None = None) -> list[str]:
        """All reasons why ``kernel`` cannot compute this, here or in another ``place``; empty when it can."""
        place = place or self.place
        dense = [layer for layer in place.layers if layer.index in self.pattern.dense_layers]
        others = [layer for layer in place.layers if layer.index not in self.pattern.dense_layers]
        try:
            computer = self.kernel(kernel)
            found = []
            for layers, pattern in ((others, self.pattern), (dense, _FULL)):
                if layers:
                    found += computer.unsupported(layers, place.device, place.dtype, place.page_size, pattern)
        except UnsupportedError as error:
            return [str(error)]
        except Exception as error:
            origin = self._kernels.origin(kernel)
            if not origin:
                raise
            return [f"kernel {kernel} of {origin} failed when asked what it can do: {described(error)}"]
        return list(dict.fromkeys(found))

    def nearest(self, asked: str | None) -> str:
        """The nearest alternative: another kernel, another page size or dtype, or another backend.

        Args:
            asked: the kernel that was asked for by name and refused; ``None`` if no kernel of the order can.

        Returns:
            The last part of a sentence, to follow the refusal.
        """
        ways = []
        if asked is not None:
            working = next((name for name in self.order if name != asked and not self.reasons(name)), None)
            if working is not None:
                ways.append(f"kernel {working} or auto")
        for name in self.order if asked is None else (asked,):
            if (change := self._change(name)) is not None:
                ways.append(f"{change} for kernel {name}")
                break
        if not ways and (other := self._other_backend()) is not None:
            ways.append(f"attention {other}")
        return f"choose {', or '.join(ways)}" if ways else "no other backend can serve this model here either"

    def _change(self, kernel: str) -> str | None:
        """The smallest change of page size and dtype that lets ``kernel`` compute this."""
        for place in _neighbors(self.place):
            if not self.reasons(kernel, place):
                changes = []
                if place.page_size != self.place.page_size:
                    changes.append(f"page size {place.page_size}")
                if place.dtype != self.place.dtype:
                    changes.append(f"kv dtype {str(place.dtype).removeprefix('torch.')}")
                return " and ".join(changes)
        return None

    def _other_backend(self) -> str | None:
        """Another of Longspan's own backends that works with its defaults; one of the same pattern first."""
        found = []
        for name in self._backends.names:
            if name == self.backend or self._backends.origin(name):
                continue
            try:
                other = KernelChoice(self._backends, self._kernels, name, {}, self.place)
            except UnsupportedError:  # for example, an option of it has no default
                continue
            if any(not other.reasons(kernel) for kernel in other.order):
                found.append(other)
        found.sort(key=lambda other: other.pattern.name != self.pattern.name)
        return found[0].backend if found else None


def pattern_of(backends: Registry, name: str, options: Mapping[str, str]) -> Pattern:
    """The pattern of a backend, made from its options.

    Raises:
        UnsupportedError: a name or option is unknown, or its package is broken.
    """
    entry, origin = load_backend(backends, name), backends.origin(name)
    try:
        pattern = imported(entry.pattern)(options)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    except Exception as error:
        if not origin:
            raise
        raise UnsupportedError(
            f"backend {name} of {origin} cannot make its pattern: {described(error)}; "
            "repair or uninstall that package"
        ) from error
    if not isinstance(pattern, Pattern):
        raise UnsupportedError(
            f"backend {name} of {origin} makes {type(pattern).__name__}, not an "
            "attention.patterns.base.Pattern; repair or uninstall that package"
        )
    return pattern


def _neighbors(place: Place) -> Iterator[Place]:
    """Other page sizes, the nearest first, then other dtypes, then both."""
    sizes = sorted(
        (size for size in _PAGE_SIZES if size != place.page_size),
        key=lambda size: abs(math.log2(size / place.page_size)),
    )
    dtypes = [dtype for dtype in _DTYPES if dtype != place.dtype]
    yield from (place._replace(page_size=size) for size in sizes)
    yield from (place._replace(dtype=dtype) for dtype in dtypes)
    yield from (place._replace(dtype=dtype, page_size=size) for dtype, size in product(dtypes, sizes))
