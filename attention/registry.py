"""Backends and kernels by name: Longspan's own, and those of installed packages.

A package offers a backend by an entry point of the group ``longspan.backends`` that names a ``Backend``, and
a kernel by one of ``longspan.kernels`` that names a ``Kernel`` class. Nothing of it is imported before its
name is used.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from attention.patterns.base import Pattern


class UnsupportedError(ValueError):
    """The settings cannot work; the message gives all reasons and the nearest alternative that works."""


class Backend(NamedTuple):
    """A backend, as ``--attention`` names it.

    Attributes:
        pattern: makes the pattern from its options, raising ValueError for options that it cannot take; or
            ``module:function``, imported when used.
        kernels: names of the kernels that can compute it, in the order in which ``auto`` tries them. Empty:
            those of ``sparse``, which compute any pattern.
        family: ``module:mapping`` whose keys are the patterns that the option ``pattern`` can name, for
            a backend that has several.
        read: ``module:function`` that refuses the options that ``pattern`` would, without torch, so that a
            server refuses them before it has an engine; ``None`` if there is none.
    """

    pattern: str | Callable[[Mapping[str, str]], Pattern]
    kernels: tuple[str, ...] = ()
    family: str | None = None
    read: str | None = None


class Registry:
    """The backends or the kernels, by name.

    Args:
        kind: ``backend`` or ``kernel``; the entry points' group is ``longspan.`` and its plural.
        own: Longspan's own by name, as themselves or as ``module:attribute``.
    """

    def __init__(self, kind: str, own: Mapping[str, Any]) -> None:
        self._kind = kind
        self._own = own
        self._foreign: dict[str, list[EntryPoint]] = {}
        for point in _entry_points(f"longspan.{kind}s"):
            self._foreign.setdefault(point.name, []).append(point)

    @property
    def names(self) -> list[str]:
        """All names, Longspan's own first."""
        return [*self._own, *self.foreign]

    @property
    def foreign(self) -> list[str]:
        """Names that only installed packages offer."""
        return sorted(name for name in self._foreign if name not in self._own)

    def origin(self, name: str) -> str:
        """The package that offers ``name``, with its version; empty for Longspan's own."""
        return " and ".join(map(_distribution, self._foreign.get(name, [])))

    def load(self, name: str) -> Any:
        """The backend or kernel of this name, imported now.

        Raises:
            UnsupportedError: the name is unknown or not unique, or its package is broken.
        """
        points = self._foreign.get(name, [])
        if name in self._own and points:
            raise UnsupportedError(
                f"{self._kind} {name} is Longspan's own, but {self.origin(name)} brings one too; "
                "uninstall that package, or rename what it brings"
            )
        if len(points) > 1:
            raise UnsupportedError(
                f"{self._kind} {name} is brought by {self.origin(name)}; uninstall all but one of these"
            )
        if not points:
            if name not in self._own:
                raise UnsupportedError(unknown(f"attention {self._kind}", name, self.names))
            return imported(self._own[name])
        try:
            return points[0].load()
        except Exception as error:  # the package's code can raise anything
            raise UnsupportedError(
                f"{self._kind} {name} of {self.origin(name)} cannot be loaded: {described(error)}; "
                "repair or uninstall that package"
            ) from error


def imported(thing: Any) -> Any:
    """``thing``, or the ``module:attribute`` that it names if it is text."""
    if not isinstance(thing, str):
        return thing
    module, _, name = thing.partition(":")
    return attrgetter(name)(import_module(module))


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"there is no {what} {name!r}; choose {' or '.join(names)}{hint}"


def described(error: Exception) -> str:
    """An unexpected error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Those of installed packages, read again only where a folder of modules has changed: it takes 10 ms."""
    return _read(group, tuple((folder, _changed(folder)) for folder in sys.path))


@functools.lru_cache(maxsize=4)
def _read(group: str, folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
