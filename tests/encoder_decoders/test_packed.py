"""Packed weights of an encoder-decoder: what the packed layers compute in transformers' own model."""

import pytest
import torch

from server.engine.prepare_encoder_decoder import prepare_encoder_decoder
from server.errors import RefusedError
from server.models.difference import relative_error
from server.models.encoder_decoders.prove import _served, compute_own
from server.models.quantize import quantize
from server.models.quantized.linear import QuantizedLinear
from server.settings import Settings
from tests.encoder_decoders.harness import own_model
from tests.encoder_decoders.zoo import save_encoder_decoder

# A sum in another order rounds an activation to the neighbor of 8 bits now and then, which random weights
# carry on from layer to layer: 0.045 was measured.
ROUNDING = 0.1


def prepare(folder, **settings):
    return prepare_encoder_decoder(Settings(**settings), folder, lambda stage, fraction: None)


@pytest.mark.parametrize(("kind", "weights"), [("t5", "int8"), ("bart", "int4")])
def test_logits_are_those_of_transformers_with_the_packed_layers(kind, weights, tmp_path):
    folder = save_encoder_decoder(kind, tmp_path)
    prepared = prepare(folder, weights=weights, kv_dtype="float32")
    loaded, info = prepared.loaded, prepared.encoder_decoder
    assert prepared.weights == weights
    packed = [module for module in loaded.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) > 20
    floats, own = own_model(folder), own_model(folder)
    quantize(own, weights)
    expected, rounded = compute_own(floats, info), compute_own(own, info)
    served = _served(loaded, expected, prepared.attention, 8, torch.float32)

    def apart(others):
        return float(torch.cat([relative_error(a, b) for a, b in zip(served, others, strict=True)]).median())

    assert apart(rounded.logits) < ROUNDING
    assert apart(expected.logits) > 2 * apart(rounded.logits), "the layers must be rounded"


def test_the_cache_of_rounded_layers_is_rounded_too(tmp_path):
    folder = save_encoder_decoder("bart", tmp_path)
    assert prepare(folder, weights="int8").kv_dtype == torch.float16
    with pytest.raises(RefusedError, match="--weights fp8 is not for cpu; choose --weights int8"):
        prepare(folder, weights="fp8")
