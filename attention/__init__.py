"""Long-context attention over a paged cache: patterns say what is seen, kernels compute it."""

from attention.backends import BACKENDS, KERNELS, Attention, Backend, UnsupportedError, resolve
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.hook import Step, register
from attention.layers import read_layers
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
