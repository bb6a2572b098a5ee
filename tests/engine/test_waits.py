"""How often a step makes the host wait for the device: once, for the outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from attention.backends import resolve
from attention.cache import PagedCache
from attention.kernels import triton_paged
from attention.kernels.base import Kernel
from server.engine import sampler
from server.engine.core import EngineCore
from server.engine.penalties import SamplerState
from server.engine.row import Row
from server.engine.runner import Runner
from server.messages import Sampling, Submit
from server.models.executors.choose import choose_executor
from server.models.loaded import LoadedModel
from tests.engine.harness import GREEDY, load
from tests.engine.sampling import sample
from tests.models_zoo import save_tiny
from tests.stand_in_device import StandInDevice

PAGE_SIZE = 4
LAYERS = 3
STEPS = 2

TOPK = {"pattern": "topk", "budget": "16", "recent_pages": "1"}
RULES = {
    "full": ("full", {}),
    "window": ("sliding_window", {"window": "8", "sinks": "2"}),
    "rerotated": ("sliding_window", {"window": "8", "sinks": "2", "positions": "cache"}),
    "bigbird": ("sparse", {"pattern": "bigbird", "block": "4"}),
    "topk": ("sparse", TOPK),
    "topk everywhere": ("sparse", {**TOPK, "dense_layers": "", "prefill": "sparse"}),
    "lsh": ("sparse", {"pattern": "lsh", "hashes": "2", "buckets": "16", "window": "6"}),
}
COUNTED = [rule for rule in RULES if rule != "lsh"]  # on the host, before anything is computed

SAMPLER = "server/engine/sampler.py:_read"

DRAWN = [
    Sampling(seed=1, temperature=0.7, top_k=20),
    Sampling(seed=2, top_p=0.9, min_p=0.01),
    Sampling(seed=3, top_k=40, top_p=0.8, repetition_penalty=1.2, logit_bias={5: 2.0}),
    Sampling(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.1),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str, str], LoadedModel]:
    """Models of a kind, on the CPU or on the stand-in device."""

    @functools.cache
    def folder(kind: str):
        return save_tiny(kind, tmp_path_factory.mktemp("waits") / kind, num_hidden_layers=LAYERS)

    @functools.cache
    def model(kind: str, device: str) -> LoadedModel:
        loaded = load(folder(kind))
        if device != "cpu":
            with StandInDevice():
                loaded.model.to(StandInDevice.device)
        return loaded

    return model


def make_core(loaded: LoadedModel, kernel: str, backend: str, options: dict[str, str]) -> EngineCore:
    """An engine where the model's weights are."""
    place = torch.device("cpu"), torch.float32, PAGE_SIZE
    attention = resolve(backend, options, kernel, loaded.layers, *place)
    cache = PagedCache(
        loaded.layers,
        200,
        PAGE_SIZE,
        torch.float32,
        loaded.model.device,
        pattern=attention.pattern,
        poison=True,
    )
    return EngineCore(
        Runner(choose_executor(loaded, attention, cache)),
        context_length=256,
        max_running=8,
        max_batch_tokens=128,
        prefix_cache=False,
        check_integrity=True,
    )


def requests(samplings: list[Sampling], first: int = 1, **kwargs) -> list[Submit]:
    """In every step one of them completes a page; the first is shorter than any budget."""
    lengths = [5, 24, 30, 31]
    return [
        Submit(
            id=first + i,
            prompt=[(7 * j * j + 3 * i) % 300 + 4 for j in range(lengths[i % 4])],
            sampling=sampling,
            max_tokens=40,
            **kwargs,
        )
        for i, sampling in enumerate(samplings)
    ]


def drive(core: EngineCore, submits: list[Submit], watch: Callable[[int], None] = lambda step: None):
    """The outputs of some steps that only decode; ``watch`` is called after each."""
    for submit in submits:
        core.submit(submit)
    while any(sequence.output_len == 0 for sequence in core.scheduler.running) or core.scheduler.waiting:
        core.step()
    watch(-1)
    outputs = []
    for step in range(STEPS):
        outputs.append([(one.id, one.tokens, one.logprobs) for one in core.step().sequences])
        watch(step)
    return outputs


def watched(models, kernel: str, rule: str, submits: list[Submit], expected: dict[str, int], kind="llama"):
    """Decodes on the stand-in device; every step must make the host read so often, and copy nothing."""
    with StandInDevice() as device:
        reads = []

        def watch(step: int) -> None:
            if step >= 0:
                reads.append(dict(device.reads))
                assert not device.copies
                assert device.sent
            device.forget()

        outputs = drive(make_core(models(kind, "device"), kernel, *RULES[rule]), submits, watch)
    assert reads == [expected] * STEPS
    return outputs


@pytest.mark.parametrize(
    ("rule", "kind"), [*((rule, "llama") for rule in COUNTED), ("full", "mistral"), ("topk", "mistral")]
)
def test_greedy_decodes_wait_for_their_tokens_only(models, rule, kind):
    submits = requests([GREEDY] * 4)
    outputs = watched(models, "sdpa", rule, submits, {SAMPLER: 1}, kind)
    assert outputs == drive(make_core(models(kind, "cpu"), "sdpa", *RULES[rule]), submits)


@pytest.mark.parametrize("rule", COUNTED)
def test_the_triton_plan_waits_for_nothing(models, rule, monkeypatch):
    monkeypatch.setattr(triton_paged.Triton, "unsupported", lambda *_: [])
    launched = []

    def launch(call, blocks, covers) -> None:
        launched.append(len(blocks.items))
        call.output.zero_()

    # The programs themselves read memory past torch; that they compute is tested elsewhere.
    monkeypatch.setattr(triton_paged, "_launch", launch)
    monkeypatch.setattr(triton_paged.Triton, "write", Kernel.write)
    watched(models, "triton", rule, requests([GREEDY] * 4), {SAMPLER: 1})
    assert len(launched) >= STEPS * LAYERS


def test_lsh_counts_its_selection_in_every_layer(models):
    """How many runs there are, and how many tokens the longest selection has."""
    expected = {
        SAMPLER: 1,
        "attention/patterns/runs.py:runs": LAYERS,
        "attention/kernels/plan.py:plan_rows": LAYERS,
    }
    submits = requests([GREEDY] * 4)
    outputs = watched(models, "sdpa", "lsh", submits, expected)
    assert outputs == drive(make_core(models("llama", "cpu"), "sdpa", *RULES["lsh"]), submits)


@pytest.mark.parametrize("logprobs", [None, 3])
def test_draws_and_log_probabilities_come_with_the_tokens(models, logprobs):
    submits = requests(DRAWN, logprobs=logprobs, min_tokens=30, stop_token_ids=[9])
    outputs = watched(models, "sdpa", "full", submits, {SAMPLER: 1})
    assert outputs == drive(make_core(models("llama", "cpu"), "sdpa", *RULES["full"]), submits)


def test_prompts_among_decodes_wait_no_more(models):
    """But for log probabilities of a prompt's tokens: once for each chunk."""
    with StandInDevice() as device:
        core = make_core(models("llama", "device"), "sdpa", "sliding_window", {"window": "8", "sinks": "2"})
        drive(core, requests([GREEDY] * 2))
        core.submit(requests([GREEDY] * 3, first=10)[2])
        device.forget()
        core.step()
        assert device.reads == {SAMPLER: 1}
        assert not device.copies
        core.submit(requests([GREEDY] * 3, first=20, prompt_logprobs=2)[2])
        device.forget()
        core.step()
    assert device.reads == {SAMPLER: 1, "server/engine/logprobs.py:prompt_logprobs": 1}


def test_a_nucleus_of_many_tokens_waits_once_more(monkeypatch):
    monkeypatch.setattr(sampler, "_NUCLEUS", (2, 30))
    logits = torch.zeros(3, 100)
    logits[0, 7] = logits[1, :20] = 20.0

    def rows() -> list[Row]:
        return [Row(SamplerState(Sampling(seed=i, top_p=0.9), [0], 100), 0, logprobs=1) for i in range(3)]

    expected = sample(logits, rows())
    for few, reads in ((1, 1), (2, 2), (3, 3)):
        with StandInDevice() as device:
            there = logits[:few].to(device.device)
            found = sample(there, rows()[:few])
        assert device.reads == {SAMPLER: reads}
        assert found == (expected[0][:few], expected[1][:few])
