"""Steps ahead on a device that computes by itself, and in the engine's message loop."""

from __future__ import annotations

import msgspec
import pytest
import torch

from attention.transfer import AsyncCopy
from server.engine import sampler
from server.engine.core import EngineCore
from server.engine.ipc.process import Engine
from server.engine.runner import Launched, Runner
from server.messages import Abort, Beams, Sampling, Shutdown, Submit, ToEngine
from tests.engine.harness import GREEDY, greedy_requests, load, make_core, run
from tests.engine.journal import DRAWN, launched_ahead, prompts_of, told
from tests.models_zoo import save_tiny
from tests.stand_in_device import StandInDevice

WIDE = [Sampling(seed=i, temperature=2.0, top_p=share) for i, share in enumerate((0.6, 0.9, 0.99, 0.9))]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A model on the stand-in device."""
    loaded = load(save_tiny("llama", tmp_path_factory.mktemp("there") / "llama"))
    with StandInDevice():
        loaded.model.to(StandInDevice.device)
    return loaded


def long_requests(samplings: list[Sampling]) -> list[Submit]:
    return [
        Submit(id=i, prompt=prompt, sampling=sampling, max_tokens=10, logprobs=i % 2 or None)
        for i, (prompt, sampling) in enumerate(zip(prompts_of(5, 12, 9, 30), samplings, strict=True))
    ]


def test_the_next_step_is_queued_before_the_tokens_are_read(llama, there):
    """The host waits once for a step, and nothing of a launch waits."""
    requests = long_requests([GREEDY, *DRAWN[:3]])
    events: list[tuple[str, int]] = []
    steps: dict[int, int] = {}

    def watch(runner: Runner, device: StandInDevice) -> None:
        launch, collect = runner.launch, runner.collect

        def launched(scheduled, before=None) -> Launched:
            device.forget()
            result = launch(scheduled, before)
            assert not device.reads
            assert not device.copies
            assert device.sent
            steps[id(result.sampled)] = len(steps)
            events.append(("launch", steps[id(result.sampled)]))
            kept.append(result)
            return result

        def collected(flight: Launched, void) -> object:
            device.forget()
            result = collect(flight, void)
            assert device.reads == {"server/engine/sampler.py:_read": 1}
            assert not device.copies
            events.append(("read", steps[id(flight.sampled)]))
            return result

        kept: list[Launched] = []
        runner.launch, runner.collect = launched, collected

    with StandInDevice() as device:
        core = make_core(there, page_size=4, kernel="sdpa", ahead=True)
        watch(core.runner, device)
        outputs = told(core, requests)
    assert outputs == told(make_core(llama, page_size=4, kernel="sdpa"), requests)
    at = {event: i for i, event in enumerate(events)}
    last = len(steps) - 1
    assert last == 9
    assert all(at["launch", step + 1] < at["read", step] for step in range(last))
    assert all(at["read", step] < at["read", step + 1] for step in range(last))
    # Not two ahead: outputs would come late for nothing.
    assert all(at["read", step] < at["launch", step + 2] for step in range(last - 1))


def test_beams_wait_for_nothing_before_their_step(llama, there):
    """Copies of pages, and what finds the next tokens, are queued, beside sequences launched ahead."""
    requests = long_requests([GREEDY, *DRAWN[:3]])
    for i in (1, 3):
        plain = msgspec.structs.replace(requests[i], sampling=GREEDY, logprobs=None, stop_token_ids=[7])
        requests[i] = msgspec.structs.replace(plain, beams=Beams(count=3))
    rule = {"page_size": 4, "backend": "sparse", "kernel": "sdpa"}
    rule["options"] = {"pattern": "topk", "budget": "8", "recent_pages": "1", "dense_layers": ""}
    expected = run(make_core(llama, **rule), requests)
    with StandInDevice() as device:
        core = make_core(there, ahead=True, **rule)
        ahead, launch, copy, copied = launched_ahead(core), core.runner.launch, core.runner.copy, []

        def launched(scheduled, before=None) -> Launched:
            device.forget()
            result = launch(scheduled, before)
            assert not device.copies
            return result

        def watched(copies) -> None:
            device.forget()
            copy(copies)
            assert not device.reads
            assert not device.copies
            copied.extend(copies)

        core.runner.launch, core.runner.copy = launched, watched
        found = run(core, requests)
    assert len(copied) > 6
    assert max(ahead) > 1
    assert {i: one.tokens for i, one in found.items()} == {i: one.tokens for i, one in expected.items()}


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("sliding_window", {"window": "6", "sinks": "2"}),
        ("sparse", {"pattern": "topk", "budget": "8", "recent_pages": "1", "dense_layers": ""}),
        pytest.param(
            *("sparse", {"pattern": "lsh", "hashes": "2", "buckets": "8", "window": "4"}),
            marks=pytest.mark.stress,
        ),
    ],
)
def test_a_token_that_took_a_second_look_is_computed_again(llama, there, monkeypatch, backend, options):
    """The step ahead was computed without it, and wrote another token's keys, and summaries of them."""
    monkeypatch.setattr(sampler, "_NUCLEUS", (2, 30))
    late, read = [], sampler.read

    def watched(sampled, void):
        found = read(sampled, void)
        late.extend(found.late)
        return found

    monkeypatch.setattr(sampler, "read", watched)
    requests = long_requests(WIDE)
    rule = {"page_size": 2, "backend": backend, "options": options, "kernel": "sdpa", "prefix_cache": True}
    expected = run(make_core(llama, **rule), requests)
    assert not late  # on the CPU there is no second look
    with StandInDevice():
        core = make_core(there, ahead=True, **rule)
        ahead = launched_ahead(core)
        found = run(core, requests)
        assert len(late) > 5
        assert ahead
        for request in requests:
            assert found[request.id].tokens == expected[request.id].tokens
            assert found[request.id].finish == expected[request.id].finish
        # The pages that such sequences published hold the tokens of their keys.
        again = [
            Submit(id=10 + r.id, prompt=r.prompt + found[r.id].tokens, sampling=GREEDY, max_tokens=2)
            for r in requests
        ]
        hits = run(core, again)
        assert backend == "sparse" or all(hits[r.id].cached_tokens > 0 for r in again)
    fresh = run(make_core(llama, **{**rule, "prefix_cache": False}), again)
    assert all(hits[r.id].tokens == fresh[r.id].tokens for r in again)


def test_numbers_on_their_way_are_not_there_before_they_are_waited_for():
    """Work that is queued later has no part in it."""
    numbers = torch.arange(4)
    with StandInDevice() as device:
        on_device = numbers.to(device.device)
        copy = AsyncCopy([on_device, on_device.float()])
        on_device.add_(1)
        device.forget()
        found = copy.wait()
        assert device.reads.total() == 1
    assert [part.tolist() for part in found] == [[0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0]]


class Wire:
    """The engine's end of a link whose other end sends ``messages``, and ``Shutdown`` to an idle engine."""

    def __init__(self, messages: list[ToEngine], core: EngineCore) -> None:
        self.messages = list(messages)
        self.core = core
        self.waits: list[int | None] = []
        self.flying: list[bool] = []

    def poll(self, milliseconds: int | None) -> bool:
        if not self.messages and milliseconds != 0:
            self.waits.append(milliseconds)
            self.messages.append(Shutdown())
        return bool(self.messages)

    def receive(self) -> bytes:
        return msgspec.msgpack.encode(self.messages.pop(0))

    def send(self, message: bytes) -> None:
        self.flying.append(self.core._flight is not None)


def test_outputs_are_sent_while_the_next_step_is_in_flight(simple, pulse):
    core = make_core(simple, ahead=True)
    wire = Wire([*greedy_requests(prompts_of(4, 6, vocabulary=8), 7)], core)
    Engine(wire, pulse).run(core)
    assert wire.flying == [True] * 6 + [False]
    assert len(wire.waits) == 1, "an idle engine waits, and is not asked again and again"
    assert wire.waits[0] != 0


def test_an_idle_engine_sleeps_until_there_is_work(simple, pulse):
    core = make_core(simple)
    wire = Wire([*greedy_requests(prompts_of(4, vocabulary=8), 3)], core)
    Engine(wire, pulse).run(core)
    assert wire.waits == [None]


def test_the_pulse_tells_of_every_step_and_of_what_was_read(simple, pulse):
    core = make_core(simple)
    requests = greedy_requests(prompts_of(4, 6, vocabulary=8), 3)
    wire = Wire([*requests], core)
    begun = []
    step, send = core.step, wire.send
    core.step = lambda: (begun.append(pulse.read()), step())[1]
    wire.send = lambda message: (begun.append(pulse.read()), send(message))
    Engine(wire, pulse).run(core)
    assert len(begun) == 2 * 3
    assert all(reading.began and reading.handled == len(requests) for reading in begun)
    assert begun[0::2] == begun[1::2], "the output is sent within the step"
    assert len({reading.began for reading in begun}) == 3
    assert pulse.read() == (0, len(requests), False), "the end is not dealt with, but obeyed"


def test_an_engine_ends_with_a_step_in_flight(simple, pulse):
    core = make_core(simple, ahead=True)
    requests = greedy_requests(prompts_of(4, 6, vocabulary=8), 7)
    core.submit(requests[0])
    core.step()
    wire = Wire([Abort([requests[0].id])], core)
    Engine(wire, pulse).run(core)
    assert not core.has_work
    core.submit(requests[1])
    core.step()
    assert core._flight is not None
    wire = Wire([Shutdown()], core)
    Engine(wire, pulse).run(core)
    assert not wire.flying
