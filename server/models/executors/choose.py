"""Which executor a deployment runs."""

from __future__ import annotations

import logging

import torch

from attention.backends import Attention
from attention.cache import PagedCache
from server.models.executors.base import Executor
from server.models.executors.captured import CapturedExecutor, CaptureError
from server.models.executors.eager import EagerExecutor
from server.models.executors.graph import CudaGraph
from server.models.executors.native import NativeExecutor
from server.models.loaded import LoadedModel

log = logging.getLogger("longspan.engine")


def choose_executor(loaded: LoadedModel, attention: Attention, cache: PagedCache) -> Executor:
    """That of encoder-decoders for these; for others the native one where it can run the model, else layer by
    layer. See also ``captured``.

    Args:
        loaded: the model.
        attention: pattern and kernel.
        cache: keys and values of all layers.

    Raises:
        UnsupportedError: the pattern's in-cache positions don't go with how the model rotates its keys.
    """
    if loaded.halves is not None:
        from server.models.executors.encoder_decoder import EncoderDecoderExecutor

        return EncoderDecoderExecutor(loaded, attention, cache, loaded.halves.reason)
    obstacle = NativeExecutor.obstacle(loaded, attention)
    if obstacle is None:
        return NativeExecutor(
            loaded, attention, cache, "its layers are packed, and a step is one native call"
        )
    return EagerExecutor(loaded, attention, cache, f"a step is not one native call: {obstacle}")


def captured(executor: Executor, *, most: int, context_length: int) -> Executor:
    """The same with its decode steps captured in CUDA graphs; where that fails, a warning says why.

    Args:
        executor: on a CUDA device; none of its cache's pages may be in use yet.
        most: sequences of a step, at most.
        context_length: tokens of a sequence, at most.
    """
    assert isinstance(executor, EagerExecutor)
    pool = torch.cuda.graph_pool_handle()
    try:
        return CapturedExecutor(executor, lambda: CudaGraph(pool), most=most, context_length=context_length)
    except CaptureError as error:
        executor.reason += f"; decode steps are not captured in CUDA graphs: {error}"
        log.warning(
            "decode steps are not captured in CUDA graphs; their kernels are launched one by one: %s", error
        )
        return executor
