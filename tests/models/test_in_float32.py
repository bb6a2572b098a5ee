"""A model of 16 bits computes in float32 what its own weights in float32 would, and is left as it was."""

import copy

import pytest
import torch
from torch import nn

from server.models.in_float32 import in_float32
from server.models.load import load_model
from tests.cover import every_value
from tests.models_zoo import KINDS, VOCABULARY, save_tiny

IDS = torch.randint(VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))


def eager(model):
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits[0]


@every_value(kind=[kind for kind in KINDS if kind != "bloom"], dtype=["bfloat16", "float16"])
def test_logits_are_those_of_the_same_weights_in_float32(kind, dtype, tmp_path):
    model = load_model(save_tiny(kind, tmp_path), dtype, "cpu", None, lambda *_: None).model
    before = {name: (id(tensor), tensor.dtype) for name, tensor in model.state_dict(keep_vars=True).items()}
    rounded = eager(model)
    with in_float32(model):
        found = eager(model)
    assert {name: (id(t), t.dtype) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert torch.equal(eager(model), rounded)
    assert found.dtype == torch.float32
    wide = copy.deepcopy(model).float()
    expected = eager(wide)
    # Gemma scales its embeddings by a number that its dtype rounds.
    close = 0.03 if "gemma" in kind else 1e-4
    assert float((found - expected).std()) <= close * float(expected.std())


def test_a_module_that_fails_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3)).bfloat16()
    before = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(RuntimeError), in_float32(model):
        model(torch.zeros(2, 4))
    assert [id(parameter) for parameter in model.parameters()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_copy_is_there_only_while_its_module_computes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    seen = []
    model[1].register_forward_pre_hook(
        lambda module, args: seen.append([parameter.dtype for parameter in model.parameters()])
    )
    with in_float32(model), torch.inference_mode():
        assert model(torch.zeros(2, 4)).dtype == torch.float32
    assert seen == [[torch.bfloat16] * 4]


def test_a_model_of_float32_computes_as_it_is():
    model = nn.Linear(4, 4)
    with in_float32(model):
        assert not model._forward_hooks
