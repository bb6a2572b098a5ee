"""Captured decode steps by a graph that stands for CUDA's, with Triton's interpreter for attention.

Whether it interprets is settled when Triton is imported, so ``tests/attention/test_triton.py`` runs this in a
process of its own.
"""

from __future__ import annotations

import pytest
import torch

from attention.backends import resolve
from attention.cache import PagedCache
from attention.kernels import triton_device, triton_paged
from attention.step import DeviceBatch
from attention.transfer import to_device
from server.engine.sequence import Sequence
from server.messages import Sampling, Submit
from server.models.executors import captured
from server.models.executors.base import StepInput
from server.models.executors.captured import CapturedExecutor, CaptureError
from server.models.executors.eager import EagerExecutor
from tests.engine.harness import GREEDY, greedy_requests, load, make_core, run
from tests.interpreter import replace_language_once
from tests.models_zoo import save_tiny
from tests.stand_in_graph import StandInGraph

torch.set_num_threads(1)
replace_language_once()
PAGE_SIZE = 4
PAGES = 60


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each takes the interpreter some 25 ms."""
    small = triton_device.INTERPRETED._replace(processors=2)
    monkeypatch.setattr(triton_paged, "device_of", lambda _: small)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_tiny("llama", tmp_path_factory.mktemp("graphs") / "two", num_hidden_layers=2))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """For what is the same in all layers and heads of a captured step, in a quarter of the programs."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return load(save_tiny("llama", tmp_path_factory.mktemp("graphs") / "one", **small))


def capture(eager, graph, most=1):
    return CapturedExecutor(eager, graph, most=most, context_length=40)


class Engine:
    """A model over a poisoned cache, whose decodes are computed directly and by captured steps."""

    def __init__(self, loaded, backend="full", options=None, sizes=(1,)):
        place = torch.device("cpu"), torch.float32, PAGE_SIZE
        self.attention = resolve(backend, options or {}, "triton", loaded.layers, *place)
        pattern = self.attention.pattern
        self.cache = PagedCache(loaded.layers, PAGES, PAGE_SIZE, torch.float32, pattern=pattern, poison=True)
        self.eager = EagerExecutor(loaded, self.attention, self.cache, "it is to be captured")
        self.recorded: list[StandInGraph] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(captured, "batch_sizes", lambda most: sizes)
            self.executor = capture(self.eager, self._graph, sizes[-1])
        for tensor in self.tensors():
            tensor.fill_(torch.nan)

    def tensors(self):
        """All of the cache."""
        return [each for layer in self.cache.layers.values() for each in layer if each is not None]

    def _graph(self):
        self.recorded.append(StandInGraph())
        return self.recorded[-1]

    def sequence(self, number, length, pages):
        """One whose prompt is in the cache, all but the last token."""
        prompt = [(11 * number + 5 * i) % 300 + 4 for i in range(length)]
        sequence = Sequence(Submit(id=number, prompt=prompt, sampling=GREEDY, max_tokens=30), number)
        sequence.table.replace(list(pages))
        self.compute([sequence], [length])
        sequence.computed = length
        sequence.tokens.append(number + 9)
        return sequence

    def work(self, sequences, counts):
        ids = [
            i for s, n in zip(sequences, counts, strict=True) for i in s.tokens[s.computed : s.computed + n]
        ]
        return StepInput(
            ids=torch.tensor(ids),
            computed=[s.computed for s in sequences],
            counts=counts,
            prompt_lens=[s.prompt_len for s in sequences],
            expected=[s.expected for s in sequences],
            tables=[s.table for s in sequences],
            page_size=PAGE_SIZE,
        )

    @torch.inference_mode()
    def compute(self, sequences, counts):
        return self.eager.logits(self.work(sequences, counts)).clone()

    @torch.inference_mode()
    def captured(self, sequences):
        work = self.work(sequences, [1] * len(sequences))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.eager, "logits", None)
            return self.executor.logits(work)

    def step(self, sequences):
        """One token for each, directly and captured, from the same cache, to the same effect."""
        tensors = self.tensors()
        before = [tensor.clone() for tensor in tensors]
        direct = self.compute(sequences, [1] * len(sequences))
        written = [tensor.clone() for tensor in tensors]
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        captured = self.captured(sequences)
        torch.testing.assert_close(tensors, written, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(captured, direct, rtol=1e-4, atol=1e-4)
        for sequence, row in zip(sequences, direct, strict=True):
            sequence.computed += 1
            sequence.tokens.append(int(row.argmax()))


@pytest.fixture(scope="module")
def engine(one_layer):
    """For tests that leave it as they found it: a capture takes the interpreter a tenth of a second."""
    return Engine(one_layer)


BACKENDS = {
    "full": ("full", {}),
    "rerotated": ("sliding_window", {"window": "8", "sinks": "2", "positions": "cache"}),
    "topk": ("sparse", {"pattern": "topk", "budget": "12", "recent_pages": "1", "dense_layers": "0"}),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_steps_equal_direct_ones(model, one_layer, backend):
    """With sequences that grow over pages, in batches that were captured and that are filled up."""
    engine = Engine(model if backend == "full" else one_layer, *BACKENDS[backend], sizes=(1, 3))
    first = engine.sequence(1, 11, [7, 9, 3, 20, 21, 22])
    engine.step([first])
    others = [engine.sequence(2, 3, [8, 10, 31, 32]), engine.sequence(3, 17, [50, 41, 42, 43, 44, 45])]
    for _ in range(2):
        engine.step([first, *others])
    engine.step([others[1], first])


def test_rows_of_the_table_pass_on(one_layer):
    """To sequences that come later, and to one that was preempted and got other pages."""
    engine = Engine(one_layer, sizes=(2,))
    one, two = engine.sequence(1, 5, [7, 9, 3]), engine.sequence(2, 6, [11, 12, 13])
    engine.step([one, two])
    three = engine.sequence(3, 7, [21, 22, 23])
    engine.step([three, two])
    tokens, computed = two.tokens, two.computed
    two.table.replace([31, 32, 33])
    two.computed = 0
    engine.compute([two], [computed])
    two.tokens, two.computed = tokens, computed
    for tensor in engine.tensors():
        tensor[[11, 12, 13]] = torch.nan
    engine.step([two, three])
    engine.step([engine.sequence(1, 5, [7, 9, 3]), two])


def test_a_step_launches_the_same_kernels_for_all_lengths(engine):
    (graph,) = engine.recorded
    launches = len(graph.calls)
    sequence = engine.sequence(1, 30, list(range(20, 30)))
    engine.step([sequence])
    assert len(graph.calls) == launches


def test_an_engine_gives_the_same_tokens(one_layer):
    """With sequences that come and end, a token drawn, and a step ahead on memory that the next one fills."""
    sampling = Sampling(seed=3, temperature=0.8, top_p=0.9)
    requests = [
        *greedy_requests([[5, 9, 12, 30, 31], [40, 41, 7]], 7),
        Submit(id=9, prompt=[8, 8, 9, 100], sampling=sampling, max_tokens=3, logprobs=1),
        Submit(id=10, prompt=[7, 3], sampling=sampling, max_tokens=6, logprobs=1, forced=[90, 91, 92, 93]),
    ]
    sizes = {"pages": PAGES, "page_size": PAGE_SIZE, "max_running": 3, "context_length": 40}
    expected = run(make_core(one_layer, kernel="reference", **sizes), requests)
    core = make_core(one_layer, kernel="triton", ahead=True, **sizes)
    executor = core.runner.executor = capture(core.runner.executor, StandInGraph, most=3)
    replayed = []
    replay = executor._replayed
    executor._replayed = lambda step: replayed.append(step) or replay(step)
    outcomes = run(core, requests)
    for number, outcome in expected.items():
        assert outcomes[number].tokens == outcome.tokens
    assert len(replayed) >= 5
    assert {len(step.counts) for step in replayed} <= {1, 2, 3}
    assert all("batch" not in vars(step) for step in replayed)  # nothing of it is sent to the device


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda ids, batch: to_device(torch.arange(3), ids.device), "numbers of the host can't be part"),
        (lambda ids, batch: batch.host, "has no attribute 'host'"),
        (lambda ids, batch: ids.max().item(), "wait for the device"),
        (lambda ids, batch: ids.nonzero(), "wait for the device"),
        (lambda ids, batch: {}["launch"], "KeyError: 'launch'"),
    ],
)
def test_steps_that_need_the_host_are_refused(engine, fault, reason, monkeypatch):
    forward = engine.eager.forward

    def faulty(ids, batch):
        if isinstance(batch, DeviceBatch):
            fault(ids, batch)
        return forward(ids, batch)

    monkeypatch.setattr(engine.eager, "forward", faulty)
    with pytest.raises(CaptureError, match=reason):
        capture(engine.eager, StandInGraph)


def test_a_step_that_computes_something_else_is_refused(engine, monkeypatch):
    forward = engine.eager.forward

    def other(ids, batch):
        logits = forward(ids, batch)
        return logits * 1.1 if isinstance(batch, DeviceBatch) else logits

    monkeypatch.setattr(engine.eager, "forward", other)
    with pytest.raises(CaptureError, match=r"differ by 0\.1 of their standard deviation"):
        capture(engine.eager, StandInGraph)
