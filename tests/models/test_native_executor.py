"""All layers as one native call give what the layers give one by one, to the last bit."""

from dataclasses import replace

import pytest
import torch

from attention.hook import Step
from attention.kernels.cpu.chain import Chain
from attention.step import StepBatch
from server.engine.core import EngineCore
from server.engine.runner import Runner
from server.models.executors.base import PageTable, StepInput
from server.models.executors.eager import EagerExecutor
from server.models.quantized.model import QuantizedModel
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.models_zoo import VOCABULARY, save_tiny

# Lengths around the rows that one thread prepares by itself, a tile, and the tokens of a step.
LENGTHS = [1, 2, 3, 37, 130]
PROMPTS = [
    torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in LENGTHS
]


# It stretches positions once a text has more than 64.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FORMS = {
    "frequencies by length": ("llama", {"max_position_embeddings": 64, "rope_parameters": DYNAMIC}),
    "floats for the output layer": ("llama", {}),
}


def packed(kind, config, folder):
    loaded = load(save_tiny(kind, folder, **config), weights="int8")
    assert isinstance(loaded.model, QuantizedModel)
    return loaded


@pytest.mark.parametrize(
    ("kind", "backend", "options"),
    [
        ("llama", "full", {}),
        ("qwen2", "sliding_window", {"window": "32", "sinks": "4"}),
        ("qwen3", "sparse", {"pattern": "bigbird"}),
        ("llama", "sparse", {"pattern": "topk", "budget": "48", "recent_pages": "1", "sink_pages": "1"}),
        ("frequencies by length", "full", {}),
        ("floats for the output layer", "full", {}),
    ],
)
def test_one_call_equals_layer_by_layer(kind, backend, options, tmp_path, monkeypatch):
    loaded = packed(*FORMS.get(kind, (kind, {})), tmp_path / "model")
    if kind == "floats for the output layer":
        plain = load(tmp_path / "model").model.get_output_embeddings()
        model = loaded.model
        head = QuantizedModel(model.embedding, model.rotary, model.decoder, model.norm, plain, model.config)
        loaded = replace(loaded, model=head)
    attended, chained = [], []
    attend, chain = Step.attend, Chain.run
    monkeypatch.setattr(Step, "attend", lambda *args: attended.append(1) or attend(*args))
    monkeypatch.setattr(Chain, "run", lambda self, *watched: chained.append(1) or chain(self, *watched))

    def outputs(core):
        steps = [0]
        forward = core.step

        def counted():
            steps[0] += 1
            return forward()

        core.step = counted
        # So many tokens that all but the shortest get another page.
        return run(core, greedy_requests(PROMPTS, 20, logprobs=3)), steps[0]

    core = make_core(loaded, backend=backend, options=options, max_batch_tokens=64)
    native = core.runner.executor
    assert native.name == "native"
    whole, steps = outputs(core)
    # A step is one native call, with any number of layers.
    assert len(chained) == steps
    assert not attended
    eager = EagerExecutor(loaded, native.attention, native.cache, "for comparison")
    core = EngineCore(Runner(eager), context_length=400, max_running=32, max_batch_tokens=64)
    one_by_one, _ = outputs(core)
    assert attended
    assert (native.rope is None) == (kind != "frequencies by length")
    assert native.thread_invariant == (kind != "floats for the output layer")
    for id, outcome in whole.items():
        assert outcome.tokens == one_by_one[id].tokens
        assert outcome.logprobs == one_by_one[id].logprobs


def test_a_step_of_several_chunks_equals_steps_of_one(tmp_path):
    """The operator takes 128 or 256 rows at a time, as wide as the processor's vectors are."""
    loaded = packed("llama", {"max_position_embeddings": 1024}, tmp_path)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (300, 517)]
    outcomes = []
    for most, steps in ((1024, 5), (64, 100)):
        core = make_core(loaded, context_length=1024, max_batch_tokens=most)
        assert core.runner.executor.name == "native"
        outcomes.append(run(core, greedy_requests(prompts, 5, logprobs=3), max_steps=steps))
    whole, parts = outcomes
    for id, outcome in whole.items():
        assert outcome.tokens == parts[id].tokens
        assert outcome.logprobs == parts[id].logprobs


def test_the_batch_of_decodes_is_advanced_and_not_built(tmp_path, monkeypatch):
    core = make_core(packed("llama", {}, tmp_path))
    built = []
    build = StepBatch.__init__
    monkeypatch.setattr(StepBatch, "__init__", lambda *args: built.append(1) or build(*args))
    for request in greedy_requests(PROMPTS, 40):
        core.submit(request)
    for _ in range(5):
        core.step()
    built.clear()
    for _ in range(30):
        assert len(core.step().sequences) == len(PROMPTS)
    assert not built
    # Another sequence, and other pages of one of these.
    core.submit(greedy_requests(PROMPTS[:1], 5, first_id=99)[0])
    core.step()
    assert built
    built.clear()
    core.scheduler.restart(core.scheduler.running[0])
    core.step()
    assert built


def test_why_a_step_is_not_one_call_is_said(tmp_path):
    loaded = packed("llama", {}, tmp_path / "packed")
    executor = make_core(loaded, backend="sparse", options={"pattern": "lsh"}).runner.executor
    assert executor.name == "layer_by_layer"
    assert executor.reason == "a step is not one native call: lsh selects keys in torch"
    assert run(make_core(loaded, kernel="sdpa"), greedy_requests(PROMPTS[:2], 3))[1].tokens
    plain = make_core(load(save_tiny("llama", tmp_path / "plain"))).runner.executor
    assert "its weights are to stay floats" in plain.reason


def test_two_engines_of_one_model_take_turns(tmp_path):
    loaded = packed("llama", {}, tmp_path)
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


def test_a_step_of_other_tokens_than_it_counts_is_refused():
    """Native code takes the number of rows from the ids and their places from the counts."""
    tables = [PageTable([1]), PageTable([2])]
    fields = {"computed": [0, 3], "prompt_lens": [2, 3], "expected": [2, 4], "page_size": 16}
    StepInput(ids=torch.zeros(3, dtype=torch.long), counts=[2, 1], tables=tables, **fields)
    for rows, counts, own in ((4, [2, 1], tables), (3, [2, 1], tables[:1])):
        with pytest.raises(ValueError, match="of different tokens or sequences"):
            StepInput(ids=torch.zeros(rows, dtype=torch.long), counts=counts, tables=own, **fields)
