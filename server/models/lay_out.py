"""From a model of transformers to the form that serves, proven where that can be strict."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from server.models.loaded import LoadedModel
from server.models.pack_model import pack_model
from server.models.quantize import Weights, quantize
from server.models.recognize_layers import fuse, recognize_layers
from server.models.refusing import refusing

log = logging.getLogger("longspan.models")

Proof = TypeVar("Proof")


def lay_out(
    loaded: LoadedModel, weights: Weights, prove: Callable[[LoadedModel], Proof]
) -> tuple[LoadedModel, str, Proof]:
    """Recognizes layers, and builds of them the form that this device computes fastest.

    On a CPU that is a packed model, beside the one that was loaded, where all layers can be packed. Else lean
    layers take the places of those that were recognized, and linear layers are packed where they are.

    Args:
        loaded: the model as it was loaded.
        weights: how to pack.
        prove: called with the model while its weights are floats, its lean layers in their places.

    Returns:
        The model that serves, the form of the weights inside its decoder, like ``int4`` or ``float32``, and
        what ``prove`` gave.

    Raises:
        RefusedError: the weights can't be packed so, a packed layer computes something else than its weights
            do, or the model fails while its layers are recognized.
    """
    with refusing(loaded.architecture, "recognizing its layers"):
        recognition = recognize_layers(loaded.model)
        packed = pack_model(loaded, recognition, weights)
    if not isinstance(packed, str):
        return *packed, prove(loaded)
    log.info("%s is not one packed model: %s", loaded.architecture, packed)
    loaded = replace(loaded, unpacked=packed)
    fuse(recognition)
    log.info("%d of %d decoder layers are fused", len(recognition.layers), len(loaded.layers))
    del recognition  # so that the weights that packing replaces are freed
    proof = prove(loaded)
    return loaded, quantize(loaded.model, weights), proof
