"""All layers as one native call give what the layers give one by one, to the last bit."""

import pytest
import torch

from attention.hook import Step
from attention.kernels.cpu.chain import Chain
from server.models import quantize as quantizing
from server.models.quantize import quantize
from server.models.quantized.layer import QuantizedLayer
from server.models.quantized.stack import QuantizedStack
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.models_zoo import VOCABULARY, save_tiny

# Lengths around the rows that one thread prepares alone, a tile, and a chunk.
LENGTHS = [1, 2, 3, 37, 130]
PROMPTS = [
    torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in LENGTHS
]


def packed(kind, folder, **config):
    loaded = load(save_tiny(kind, folder, **config))
    assert quantize(loaded.model, "int8") == "int8"
    assert [type(module) for module in loaded.model.model.layers] == [QuantizedStack]
    return loaded


@pytest.mark.parametrize(
    ("kind", "backend", "options"),
    [
        ("llama", "full", {}),
        ("qwen2", "sliding_window", {"window": "32", "sinks": "4"}),
        ("qwen3", "sparse", {"pattern": "bigbird"}),
    ],
)
def test_a_stack_equals_its_layers(kind, backend, options, tmp_path, monkeypatch):
    loaded = packed(kind, tmp_path / kind)
    attended, chained = [], []
    attend, chain = Step.attend, Chain.run
    monkeypatch.setattr(Step, "attend", lambda *args: attended.append(1) or attend(*args))
    monkeypatch.setattr(Chain, "run", lambda self: chained.append(1) or chain(self))

    def outputs(step):
        core = make_core(loaded, backend=backend, options=options, max_batch_tokens=64)
        core.runner._program = core.runner._program if step else None
        requests = greedy_requests(PROMPTS, 9, logprobs=3)
        steps = [0]
        forward = core.step

        def counted():
            steps[0] += 1
            return forward()

        core.step = counted
        return run(core, requests), steps[0]

    one_by_one, _ = outputs(False)
    assert attended
    assert not chained
    attended.clear()
    whole, steps = outputs(True)
    # A step is one native call, whatever the number of layers.
    assert len(chained) == steps
    assert not attended
    for id, outcome in whole.items():
        assert outcome.tokens == one_by_one[id].tokens
        assert outcome.logprobs == one_by_one[id].logprobs


def test_content_patterns_go_layer_by_layer(tmp_path):
    loaded = packed("llama", tmp_path)
    core = make_core(loaded, backend="sparse", options={"pattern": "lsh"})
    assert core.runner._program is None
    assert run(core, greedy_requests(PROMPTS[:2], 3))[1].tokens


def test_two_engines_of_one_model_take_turns(tmp_path):
    loaded = packed("llama", tmp_path)
    requests = greedy_requests(PROMPTS[3:4], 6)
    expected = run(make_core(loaded), requests)[1].tokens
    cores = [make_core(loaded), make_core(loaded)]
    outputs = [[], []]
    for core in cores:
        core.submit(requests[0])
    while cores[0].has_work:
        for core, own in zip(cores, outputs, strict=True):
            own += [token for item in core.step().sequences for token in item.tokens]
    assert outputs == [expected, expected]


def test_layers_that_are_called_differently_stay_apart(tmp_path, monkeypatch):
    loaded = load(save_tiny("llama", tmp_path))

    def differ(module, args, kwargs):
        angles = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": tuple(part.clone() for part in angles)}

    made = quantizing.QuantizedLayer

    def hooked(*args):
        layer = made(*args)
        layer.register_forward_pre_hook(differ, with_kwargs=True, prepend=True)
        return layer

    hooked.fits = made.fits
    monkeypatch.setattr(quantizing, "QuantizedLayer", hooked)
    quantize(loaded.model, "int8")
    assert [type(module) for module in loaded.model.model.layers] == [QuantizedLayer] * 2
