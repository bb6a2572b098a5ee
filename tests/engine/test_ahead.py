"""A step launched before the one before it is collected: the same tokens, news and pages as without."""

from __future__ import annotations

import random
from collections.abc import Iterable

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.transfer import Coming
from server.engine import sampler
from server.engine.core import EngineCore
from server.engine.kv_manager import KVManager
from server.engine.process import Engine
from server.engine.runner import Launched, Runner
from server.engine.scheduler import Scheduler, Work
from server.engine.sequence import Sequence
from server.engine.types import Abort, FinishReason, Sampling, SequenceNews, Shutdown, Submit, ToEngine
from tests.engine.harness import GREEDY, greedy_requests, load, make_core, run
from tests.engine.remembering import CONTEXT, VOCABULARY, remembering
from tests.models_zoo import save_tiny
from tests.stand_in_device import StandInDevice

DRAWN = [
    Sampling(seed=3, temperature=0.8),
    GREEDY,
    Sampling(seed=4, top_p=0.9, min_p=0.02, logit_bias={3: 1.0}),
    Sampling(seed=5, top_k=20),
]
PENALIZED = Sampling(seed=6, repetition_penalty=1.3, frequency_penalty=0.4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(save_tiny("llama", tmp_path_factory.mktemp("ahead") / "llama"))


@pytest.fixture(scope="module")
def simple():
    return remembering()


def prompts_of(*lengths: int, vocabulary: int = 300) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(4, vocabulary) for _ in range(length)] for length in lengths]


def launched_ahead(core: EngineCore) -> list[int]:
    """Gets the number of sequences of each step that is launched before the one before it is collected."""
    found: list[int] = []
    launch = core.runner.launch

    def watched(works, before=None):
        if before is not None:
            found.append(len(works))
        return launch(works, before)

    core.runner.launch = watched
    return found


class Journal:
    """What an engine tells of its sequences, and whether that is consistent; its pages too, at the end."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.sequences: list[Sequence] = []
        self._aborted: set[int] = set()

    def submit(self, request: Submit) -> None:
        self.core.submit(request)
        self.sequences.append(self.core.scheduler._by_id[request.id])

    def abort(self, sequence_id: int) -> None:
        self.core.abort(sequence_id)
        self._aborted.add(sequence_id)

    def step(self) -> list[SequenceNews]:
        news = self.core.step().sequences
        for item in news:
            assert item.id not in self._aborted
            assert item.id not in self.finish
            assert (item.started is None) == (item.id in self.tokens)
            self.tokens.setdefault(item.id, []).extend(item.tokens)
            if item.finish is not None:
                self.finish[item.id] = item.finish
        return news

    def drain(self, limit: int = 2000) -> None:
        while self.core.has_work:
            self.step()
            limit -= 1
            assert limit, "the engine does not come to an end"
        assert self.core.kv.pool.held == 0

    def check_published(self) -> None:
        """Every published page must hold the tokens that its key stands for; keys are token ids here."""
        kv, keys = self.core.kv, self.core.runner.cache.layers[0].keys
        known = set()
        for sequence in self.sequences:
            for i, key in enumerate(kv._keys(sequence, sequence.total // kv.page_size)):
                known.add(key)
                page = kv.pool._page_of.get(key)
                if page is not None:
                    expected = sequence.tokens[i * kv.page_size : (i + 1) * kv.page_size]
                    assert keys[page].flatten().tolist() == expected
        assert set(kv.pool._page_of) <= known


def told(core: EngineCore, requests: Iterable[Submit]) -> list[list[tuple]]:
    """The news of every step but for times."""
    for request in requests:
        core.submit(request)
    news = []
    while core.has_work:
        news.append(
            [
                (i.id, i.tokens, i.logprobs, i.prompt_logprobs, i.finish, i.cached_tokens)
                for i in core.step().sequences
            ]
        )
    assert core.kv.pool.held == 0
    return news


def alone(loaded, request: Submit, **kwargs) -> tuple[list[int], FinishReason | None]:
    """What a sequence gets without neighbors, prefix cache and steps ahead."""
    outcome = run(make_core(loaded, prefix_cache=False, **kwargs), [request])[request.id]
    return outcome.tokens, outcome.finish


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("full", {}),
        ("sliding_window", {"window": "9", "sinks": "3"}),
        ("sparse", {"pattern": "topk", "budget": "16", "recent_pages": "1"}),
        ("sparse", {"pattern": "lsh", "hashes": "2", "buckets": "16", "window": "6"}),
    ],
)
def test_every_step_tells_the_same(llama, backend, options):
    """Chunks of prompts, log probabilities, greedy and drawn, ends by length and by stop tokens."""
    core = {
        "page_size": 4,
        "max_batch_tokens": 24,
        "max_running": 6,
        "backend": backend,
        "options": options,
        "prefix_cache": False,
    }
    requests = [
        Submit(
            id=i,
            prompt=prompt,
            sampling=DRAWN[i % 4],
            max_tokens=[1, 2, 9, 14][i % 4],
            logprobs=[None, 2][i % 2],
            prompt_logprobs=[None, None, 1][i % 3],
        )
        for i, prompt in enumerate(prompts_of(3, 30, 5, 41, 1, 17))
    ]
    plain = told(make_core(llama, **core), requests)
    outputs = [[t for news in plain for item in news if item[0] == i for t in item[1]] for i in range(6)]
    # Each may end anywhere by a token of its own.
    requests = [
        msgspec.structs.replace(request, stop_token_ids=outputs[i][i % 4 + 1 : i % 4 + 2])
        for i, request in enumerate(requests)
    ]
    plain = told(make_core(llama, **core), requests)
    assert {item[4] for news in plain for item in news} >= {FinishReason.STOP, FinishReason.LENGTH}
    engine = make_core(llama, **core, ahead=True)
    ahead = launched_ahead(engine)
    assert told(engine, requests) == plain
    # Behind the last step another one is of use only if no token ends what is left.
    assert len(plain) - 1 <= len(ahead) <= len(plain)


def test_what_a_step_cost_is_told_with_it(llama):
    requests = greedy_requests(prompts_of(3, 30, 5), 8)

    def figures(ahead: bool) -> list[tuple]:
        core = make_core(llama, page_size=4, max_running=4, max_batch_tokens=16, ahead=ahead)
        for request in requests:
            core.submit(request)
        found, seconds, began = [], 0.0, None
        while core.has_work:
            news = core.step()
            stats = news.stats
            seconds += stats.step_seconds
            began = news.time - stats.step_seconds if began is None else began
            found.append(
                (stats.prompt_tokens, stats.decode_tokens, stats.bytes_moved, stats.flops, stats.pages_read)
            )
        # Steps overlap, and their times must not.
        assert seconds <= news.time - began + 1e-6
        return found

    assert figures(True) == figures(False)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_requests_that_arrive_and_leave_over_time(simple, prefix_cache):
    requests = [
        Submit(
            id=i,
            prompt=prompt,
            sampling=DRAWN[i % 4] if i % 2 else GREEDY,
            max_tokens=i % 7 + 1,
            stop_token_ids=[i % VOCABULARY],
            priority=i % 2,
        )
        for i, prompt in enumerate(prompts_of(*[1 + 5 * i % 17 for i in range(24)], vocabulary=8))
    ]
    core = make_core(
        simple,
        page_size=2,
        pages=17,
        max_running=5,
        max_batch_tokens=9,
        prefix_cache=prefix_cache,
        ahead=True,
    )
    ahead = launched_ahead(core)
    journal = Journal(core)
    for request in requests:
        journal.submit(request)
        journal.step()
    journal.drain()
    assert sum(ahead) > 20
    assert core.scheduler.preemptions > 0
    for request in requests:
        assert (journal.tokens[request.id], journal.finish[request.id]) == alone(simple, request)
    journal.check_published()


def test_the_same_pages_are_published_and_let_go(simple):
    """A step later, at most."""
    requests = greedy_requests(prompts_of(5, 8, 3, vocabulary=8), 21)
    for rule in ({}, {"backend": "sliding_window", "options": {"window": "5", "sinks": "2"}}):
        published, held = [], []
        for ahead in (False, True):
            core = make_core(simple, page_size=2, ahead=ahead, **rule)
            for request in requests:
                core.submit(request)
            most = 0
            while core.has_work:
                core.step()
                most = max(most, core.kv.pool.held)
            published.append(set(core.kv.pool._page_of))
            held.append(most)
        assert published[0] == published[1]
        assert len(published[0]) > 3 * 20 // 2
        assert held[0] <= held[1] <= held[0] + len(requests)


def test_nobody_gives_way_to_a_step_ahead():
    def scheduled(pages: int) -> tuple[Scheduler, list[Work]]:
        scheduler = Scheduler(KVManager(pages, 2), 4, 8)
        for request in greedy_requests([[1, 2], [3, 4]], 9):
            scheduler.add(request)
        for sequence, tokens in scheduler.schedule():
            sequence.pending += 1
            scheduler.kv.advance(sequence, tokens)
        return scheduler, scheduler.schedule_ahead(set())

    for pages, expected in ((6, [1, 1]), (5, [1, 1]), (4, [])):
        scheduler, works = scheduled(pages)
        assert [tokens for _, tokens in works] == expected
        assert scheduler.preemptions == 0
        assert len(scheduler.running) == 2
        scheduler.check_integrity()
    # A more urgent one needs a place: whether somebody has to give way, the tokens will tell.
    scheduler, _ = scheduled(8)
    scheduler.max_running = 2
    for priority, expected in ((0, [1, 1]), (1, [])):
        scheduler.add(Submit(id=7 + priority, prompt=[5], sampling=GREEDY, max_tokens=3, priority=priority))
        assert [tokens for _, tokens in scheduler.schedule_ahead(set())] == expected
        assert scheduler.preemptions == 0
        scheduler.check_integrity()


def test_aborts_at_every_step(simple):
    requests = greedy_requests(prompts_of(3, 9, 4, 14, vocabulary=8), 8)
    expected = {request.id: alone(simple, request)[0] for request in requests}
    for at in range(10):
        for gone in (1, 2, 4):
            core = make_core(simple, page_size=2, pages=40, max_running=5, max_batch_tokens=8, ahead=True)
            journal = Journal(core)
            for request in requests:
                journal.submit(request)
            for _ in range(at):
                journal.step()
            journal.abort(gone)
            # The pages are free at once, and here they go to another one.
            journal.submit(Submit(id=9, prompt=[3, 3, 1, 0, 2, 2, 5], sampling=GREEDY, max_tokens=3))
            journal.drain()
            assert len(journal.tokens[9]) == 3
            for request in requests:
                tokens = journal.tokens.get(request.id, [])
                assert tokens == expected[request.id][: len(tokens)]
                assert request.id == gone or len(tokens) == 8
            journal.check_published()


def test_when_all_are_gone_nothing_is_left_to_do(simple):
    core = make_core(simple, ahead=True)
    for request in greedy_requests(prompts_of(3, 5, vocabulary=8), 9):
        core.submit(request)
    for _ in range(3):
        core.step()
    core.abort(1)
    core.abort(2)
    assert not core.has_work
    assert core.kv.pool.held == 0
    # What was in flight then is not taken for what comes now.
    (late,) = greedy_requests(prompts_of(4, vocabulary=8), 2, first_id=1)
    assert run(core, [late])[1].tokens == alone(simple, late)[0]


def test_tokens_that_stop_a_sequence_free_its_pages_for_the_next_step(simple):
    (request,) = greedy_requests(prompts_of(6, vocabulary=8), 30)
    tokens, _ = alone(simple, request)
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    core = make_core(simple, page_size=2, ahead=True)
    journal = Journal(core)
    journal.submit(msgspec.structs.replace(request, stop_token_ids=[stop]))
    ahead = launched_ahead(core)
    journal.drain()
    assert journal.tokens[1] == tokens[: tokens.index(stop) + 1]
    assert journal.finish[1] is FinishReason.STOP
    assert len(ahead) == len(journal.tokens[1])  # the last one for nothing
    journal.check_published()


def test_the_end_by_length_is_foreseen(simple):
    (prompt,) = prompts_of(6, vocabulary=8)
    for request in (
        Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=5),
        Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=999),
    ):
        core = make_core(simple, context_length=16, ahead=True)
        ahead = launched_ahead(core)
        outcome = run(core, [request])[1]
        assert outcome.finish is FinishReason.LENGTH
        assert len(outcome.tokens) == min(request.max_tokens, 10)
        assert len(ahead) == len(outcome.tokens) - 1


def test_who_has_a_penalty_is_waited_for(simple):
    requests = greedy_requests(prompts_of(5, 6, vocabulary=8), 12)
    requests.append(msgspec.structs.replace(requests[0], id=3, sampling=PENALIZED, max_tokens=4))
    core = make_core(simple, ahead=True)
    ahead = launched_ahead(core)
    journal = Journal(core)
    for request in requests:
        journal.submit(request)
    while 3 not in journal.finish:
        journal.step()
        assert not ahead
    journal.drain()
    assert ahead
    for request in requests:
        assert journal.tokens[request.id] == alone(simple, request)[0]


def test_a_prompt_waits_for_one_step_more_at_most(simple):
    core = make_core(simple, ahead=True)
    for request in greedy_requests(prompts_of(5, 6, vocabulary=8), 40):
        core.submit(request)
    core.step()
    core.submit(greedy_requests(prompts_of(7, vocabulary=8), 4, first_id=10)[0])
    assert 10 not in {item.id for item in core.step().sequences}  # it was launched before
    assert 10 in {item.id for item in core.step().sequences}


def test_the_more_urgent_still_takes_the_place_of_others(simple):
    core = make_core(simple, max_running=1, ahead=True)
    (slow,) = greedy_requests(prompts_of(5, vocabulary=8), 40)
    core.submit(slow)
    core.step()
    core.submit(greedy_requests(prompts_of(7, vocabulary=8), 4, first_id=10, priority=1)[0])
    assert [[item.id for item in core.step().sequences] for _ in range(3)] == [[1], [10], [10]]
    assert core.scheduler.preemptions == 1


def test_logits_that_are_no_numbers_end_their_sequence_only(simple):
    requests = greedy_requests(prompts_of(5, 9, 6, vocabulary=8), 12)
    expected = {request.id: alone(simple, request)[0] for request in requests}
    core = make_core(simple, page_size=2, ahead=True)
    logits_of = core.runner._logits

    def spoiled(works, batch, ids, keep):
        logits = logits_of(works, batch, ids, keep)
        caught_up = [s for s, n in works if n == s.remaining]
        for row, sequence in enumerate(caught_up):
            if sequence.id == 2 and sequence.expected >= 9 + 4:
                logits[row] = torch.nan
        return logits

    core.runner._logits = spoiled
    outcomes = run(core, requests)
    assert outcomes[2].tokens == expected[2][:4]
    assert outcomes[2].finish is FinishReason.FAILED
    for one in (1, 3):
        assert outcomes[one].tokens == expected[one]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    pages=st.integers(8, 30),
    page_size=st.integers(1, 4),
    max_running=st.integers(1, 5),
    extra_budget=st.integers(0, 12),
    prefix_cache=st.booleans(),
    window=st.booleans(),
)
def test_whatever_comes_and_goes(seed, pages, page_size, max_running, extra_budget, prefix_cache, window):
    loaded = remembering()
    rule = {"backend": "sliding_window", "options": {"window": "5", "sinks": "2"}} if window else {}
    context = min(CONTEXT, (pages - 1) * page_size)
    rng = random.Random(seed)
    requests = []
    for i in range(12):
        length = rng.randint(1, max(1, min(20, context - 2)))
        requests.append(
            Submit(
                id=i,
                prompt=[rng.choice([0, 0, 0, 1]) for _ in range(length)],
                sampling=rng.choice([GREEDY, Sampling(seed=i, top_p=0.9), *[PENALIZED] * (seed % 3 == 0)]),
                max_tokens=rng.randint(1, 12),
                min_tokens=rng.randint(0, 3),
                stop_token_ids=rng.sample(range(VOCABULARY), rng.choice([0, 1, 3])),
                priority=rng.randint(0, 1),
                leader=rng.choice([None, i - 1]),
            )
        )
    aborts = {i: rng.randint(0, 25) for i in range(12) if rng.random() < 0.3}
    arrivals = {i: rng.randint(0, 20) for i in range(12)}
    core = make_core(
        loaded,
        pages=pages,
        page_size=page_size,
        max_running=max_running,
        max_batch_tokens=max_running + extra_budget,
        prefix_cache=prefix_cache,
        context_length=context,
        ahead=True,
        **rule,
    )
    journal = Journal(core)
    for step in range(30):
        for request in requests:
            if arrivals[request.id] == step:
                journal.submit(request)
            if aborts.get(request.id) == step and arrivals[request.id] < step:
                journal.abort(request.id)
        if core.has_work:
            journal.step()
    journal.drain()
    expected = run(make_core(loaded, prefix_cache=False, context_length=context, **rule), requests)
    for request in requests:
        outcome, found = expected[request.id], journal.tokens.get(request.id, [])
        if request.id in aborts and request.id not in journal.finish:
            assert found == outcome.tokens[: len(found)]
        else:
            assert (found, journal.finish[request.id]) == (outcome.tokens, outcome.finish)
    journal.check_published()


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

        def launched(works, before=None) -> Launched:
            device.forget()
            result = launch(works, before)
            assert not device.reads
            assert not device.copies
            assert device.sent
            steps[id(result.chosen)] = len(steps)
            events.append(("launch", steps[id(result.chosen)]))
            kept.append(result)
            return result

        def collected(flight: Launched, void) -> object:
            device.forget()
            result = collect(flight, void)
            assert device.reads == {"server/engine/sampler.py:_read": 1}
            assert not device.copies
            events.append(("read", steps[id(flight.chosen)]))
            return result

        kept: list[Launched] = []
        runner.launch, runner.collect = launched, collected

    with StandInDevice() as device:
        core = make_core(there, page_size=4, kernel="sdpa", ahead=True)
        watch(core.runner, device)
        news = told(core, requests)
    assert news == told(make_core(llama, page_size=4, kernel="sdpa"), requests)
    at = {event: i for i, event in enumerate(events)}
    last = len(steps) - 1
    assert last == 9
    assert all(at["launch", step + 1] < at["read", step] for step in range(last))
    assert all(at["read", step] < at["read", step + 1] for step in range(last))
    # Not two ahead: news would come late for nothing.
    assert all(at["read", step] < at["launch", step + 2] for step in range(last - 1))


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("sliding_window", {"window": "6", "sinks": "2"}),
        ("sparse", {"pattern": "topk", "budget": "8", "recent_pages": "1", "dense_layers": ""}),
        ("sparse", {"pattern": "lsh", "hashes": "2", "buckets": "8", "window": "4"}),
    ],
)
def test_a_token_that_took_a_second_look_is_computed_again(llama, there, monkeypatch, backend, options):
    """The step ahead had to do without it, and wrote another token's keys, and digests of them."""
    monkeypatch.setattr(sampler, "_NUCLEUS", (2, 30))
    late, read = [], sampler.read

    def watched(chosen, void):
        found = read(chosen, void)
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
        # What such sequences published holds what it claims.
        again = [
            Submit(id=10 + r.id, prompt=r.prompt + found[r.id].tokens, sampling=GREEDY, max_tokens=2)
            for r in requests
        ]
        hits = run(core, again)
        assert backend == "sparse" or all(hits[r.id].cached_tokens > 0 for r in again)
    fresh = run(make_core(llama, **{**rule, "prefix_cache": False}), again)
    assert all(hits[r.id].tokens == fresh[r.id].tokens for r in again)


def test_numbers_on_their_way_are_not_there_before_they_are_waited_for():
    """What the device is given later has no part in it."""
    numbers = torch.arange(4)
    with StandInDevice() as device:
        on_device = numbers.to(device.device)
        coming = Coming([on_device, on_device.float()])
        on_device.add_(1)
        device.forget()
        found = coming.wait()
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


def test_news_are_sent_while_the_next_step_is_in_flight(simple):
    core = make_core(simple, ahead=True)
    wire = Wire([*greedy_requests(prompts_of(4, 6, vocabulary=8), 7)], core)
    Engine(wire).run(core)
    assert wire.flying == [True] * 6 + [False]
    assert len(wire.waits) == 1, "an idle engine waits, and is not asked again and again"
    assert wire.waits[0] != 0


def test_an_engine_ends_with_a_step_in_flight(simple):
    core = make_core(simple, ahead=True)
    requests = greedy_requests(prompts_of(4, 6, vocabulary=8), 7)
    core.submit(requests[0])
    core.step()
    wire = Wire([Abort([requests[0].id])], core)
    Engine(wire).run(core)
    assert not core.has_work
    core.submit(requests[1])
    core.step()
    assert core._flight is not None
    wire = Wire([Shutdown()], core)
    Engine(wire).run(core)
    assert not wire.flying


def test_steps_are_launched_one_by_one_unless_asked_for(simple):
    core = make_core(simple)
    ahead = launched_ahead(core)
    run(core, greedy_requests(prompts_of(4, 6, vocabulary=8), 7))
    assert not ahead
