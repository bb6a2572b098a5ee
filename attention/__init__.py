"""Long-context attention over a paged cache: patterns say which tokens a query sees, kernels compute it.

Exported names are imported at their first use: some parts of this package need no torch, and a server process
uses only those.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attention.backends import Attention, resolve
    from attention.batch import AttentionBatch
    from attention.cache import PagedCache
    from attention.hook import Step, register
    from attention.layers import read_layers
    from attention.names import BACKENDS, KERNELS
    from attention.registry import Backend, UnsupportedError
    from attention.types import LayerCache, LayerSpec

__all__ = [
    "BACKENDS",
    "KERNELS",
    "Attention",
    "AttentionBatch",
    "Backend",
    "LayerCache",
    "LayerSpec",
    "PagedCache",
    "Step",
    "UnsupportedError",
    "read_layers",
    "register",
    "resolve",
]

_HOMES = {
    "backends": ("Attention", "resolve"),
    "batch": ("AttentionBatch",),
    "cache": ("PagedCache",),
    "hook": ("Step", "register"),
    "layers": ("read_layers",),
    "names": ("BACKENDS", "KERNELS"),
    "registry": ("Backend", "UnsupportedError"),
    "types": ("LayerCache", "LayerSpec"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"attention.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
