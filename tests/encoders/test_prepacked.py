"""Linear layers that oneDNN computes on processors with AVX-512, and why it does not on others."""

import copy
import re

import pytest
import torch
from torch import nn

from server.engine.costs import ModelWeights
from server.models.encoders import prepacked
from server.models.encoders.load import load_encoder
from server.models.encoders.prepacked import PrepackedLinear, prepack
from tests.encoder_decoders import harness
from tests.encoder_decoders.zoo import save_encoder_decoder
from tests.encoders.zoo import save_encoder


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def made():
    layers = nn.Linear(24, 40), nn.Sequential(Doubled(40, 40)), nn.Linear(40, 7, bias=False)
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(params=["AVX2", "AVX512"])
def level(request, monkeypatch):
    """As if the processor had it; oneDNN's operators compute with AVX2 as well."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@pytest.mark.parametrize("level", ["AVX512"], indirect=True)
def test_the_layers_give_what_torch_gives(level):
    model = made()
    own = copy.deepcopy(model)
    assert prepack(model) == "2 linear layers are oneDNN's, with weights laid out in advance"
    assert [type(layer) for layer in (model[0], model[1][0], model[2])] == [
        *(PrepackedLinear, Doubled, PrepackedLinear)
    ]
    for shape in (1, 24), (9, 24), (2, 3, 24):
        rows = torch.randn(shape)
        torch.testing.assert_close(model(rows), own(rows), atol=1e-5, rtol=1e-5)


def lacking(*given):
    raise AttributeError("no such operator")


@pytest.mark.parametrize("level", ["AVX512"], indirect=True)
@pytest.mark.parametrize(
    ("where", "what", "stand_in", "sentence"),
    [
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX2", "with AVX2 oneDNN was no faster"),
        (torch.backends.mkldnn, "is_available", lambda: False, "this torch comes without oneDNN"),
        (prepacked, "PrepackedLinear", lacking, r"oneDNN can't be called \(AttributeError\)"),
        (PrepackedLinear, "forward", lambda layer, x: x.new_ones(len(x), 64) * 9, "off by .* in a trial"),
    ],
    ids=["no AVX-512", "no oneDNN", "no operator", "wrong"],
)
def test_layers_stay_where_it_can_not_compute_them(level, where, what, stand_in, sentence, monkeypatch):
    monkeypatch.setattr(where, what, stand_in)
    model = made()
    kinds = [type(layer) for layer in model.modules()]
    found = prepack(model)
    assert found.startswith("linear layers are torch's: ")
    assert re.search(sentence, found)
    assert [type(layer) for layer in model.modules()] == kinds


@pytest.mark.parametrize("level", ["AVX512"], indirect=True)
def test_layers_of_16_bits_are_torchs(level):
    model = made().bfloat16()
    assert prepack(model) == "linear layers are torch's"
    assert type(model[0]) is nn.Linear


def test_an_encoder_is_proven_with_either(level, tmp_path):
    found = load_encoder(save_encoder("bert", tmp_path), "auto", "cpu", None, lambda stage, fraction: None)
    assert ("oneDNN's" in found.linears) == (level == "AVX512")


def test_weights_cost_the_same_in_either_form(tmp_path, monkeypatch):
    folder = save_encoder_decoder("bart", tmp_path)
    weights = []
    for level in "AVX2", "AVX512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        weights.append(ModelWeights.of(harness.load(folder).loaded.model))
    plain, packed = weights
    assert packed.body == plain.body
    assert packed.head == plain.head
    # The output layer is a table of embeddings too, of which another form is beside it then.
    assert packed.stored == plain.stored + plain.head.bytes
