"""Modules are replaced by native calls where these return the same, and only there."""

import pytest
import torch
import transformers
from torch import nn

from server.models.encoders.float_linear import NativeLinear, NormedSum
from server.models.encoders.fuse import fuse
from server.models.encoders.load import load_encoder
from server.models.encoders.prepacked import prepack
from tests.encoders.zoo import save_encoder
from tests.instructions import at, with_floats

TEXT = [2, 40, 41, 42, 3]


class Summed(nn.Module):
    """What BERT's layers end with, or something near it."""

    def __init__(self, how):
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(16, 16), nn.LayerNorm(16), nn.Dropout(0.5)
        self.how = how

    def forward(self, x, around):
        return self.how(self, self.dropout(self.dense(x)), around)


class Activated(nn.Module):
    """A linear layer with GELU, or something near it."""

    def __init__(self, how, act):
        super().__init__()
        self.dense, self.act, self.how = nn.Linear(16, 16), act, how

    def forward(self, x):
        return self.how(self, self.dense(x))


class Model(nn.Module):
    """One of each."""

    device = "cpu"

    def __init__(self, summed, activated):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.summed, self.activated = summed, activated

    def forward(self, input_ids):
        x = self.table(input_ids)
        return self.activated(self.summed(x, x * 2))


def made(summed, activated, act=None):
    torch.manual_seed(0)
    return Model(Summed(summed), Activated(activated, act or nn.GELU())).eval().requires_grad_(False)


SAME = made(lambda own, x, around: own.norm(x + around), lambda own, x: own.act(x))
OTHERS = {
    "a norm before the sum": made(lambda own, x, around: own.norm(x) + around, lambda own, x: own.act(x) + x),
    "another sum": made(lambda own, x, around: own.norm(x + 1.001 * around), lambda own, x: own.act(x * 1.0)),
    "a difference": made(lambda own, x, around: own.norm(x - around), lambda own, x: x + own.act(x)),
    "another activation": made(
        lambda own, x, around: own.norm(around), lambda own, x: own.act(x), nn.GELU("tanh")
    ),
}


@with_floats
def test_what_computes_the_same_is_replaced(level):
    with at(level):
        expected = SAME(torch.tensor([TEXT]))
        prepack(SAME, native=True)
        assert fuse(SAME, TEXT) == "1 with GELU and 1 with residual and LayerNorm in the same call"
        assert isinstance(SAME.summed, NormedSum)
        assert isinstance(SAME.activated.act, nn.Identity)
        torch.testing.assert_close(SAME(torch.tensor([TEXT])), expected, atol=1e-6, rtol=1e-6)


@with_floats
@pytest.mark.parametrize("kind", OTHERS)
def test_what_computes_something_else_stays(kind, level):
    model = OTHERS[kind]
    with at(level):
        expected = model(torch.tensor([TEXT]))
        prepack(model, native=True)
        assert fuse(model, TEXT) == "0 with GELU and 0 with residual and LayerNorm in the same call"
        assert isinstance(model.summed, Summed)
        assert isinstance(model.activated.act, nn.GELU)
        torch.testing.assert_close(model(torch.tensor([TEXT])), expected, atol=1e-6, rtol=1e-6)


@with_floats
@pytest.mark.parametrize(
    ("kind", "config", "gelus", "sums"),
    [
        ("bert", {}, 2, 4),
        ("bert", {"hidden_act": "gelu_new"}, 0, 4),
        ("roberta", {}, 2, 4),
        ("electra", {}, 2, 4),
        ("distilbert", {}, 2, 0),
        ("albert", {"hidden_act": "gelu"}, 1, 0),  # whose layers are one
        ("modernbert", {}, 0, 0),
        ("mpnet", {}, 2, 2),  # whose attention adds and norms by itself
    ],
)
def test_what_families_have_in_one_call(kind, config, gelus, sums, level, tmp_path):
    folder = save_encoder(kind, tmp_path, **config)
    own = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with at(level):
        loaded = load_encoder(folder, "auto", "cpu", None, lambda stage, fraction: None)
        assert f"level {level}, {gelus} with GELU and {sums} with residual" in loaded.linears
        assert any(type(module) is NativeLinear for module in loaded.encoder.base.modules())
        (vectors,) = loaded.encoder.hidden([TEXT], [[]])
    with torch.no_grad():
        expected = own(torch.tensor([TEXT])).last_hidden_state[0]
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


def test_other_levels_have_none(tmp_path):
    with at("portable"):
        loaded = load_encoder(save_encoder("bert", tmp_path), "auto", "cpu", None, lambda *_: None)
        assert "native" not in loaded.linears
        assert loaded.encoder.kernel == "sdpa"
