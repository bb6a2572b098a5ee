"""A step of a long prompt that held up nothing is given up when another request comes; no result changes."""

from __future__ import annotations

import asyncio
import itertools
import os

import pytest
import torch

from attention.kernels.cpu.chain import Chain
from server.engine.core import EngineCore
from server.engine.division import GIVEN_UP_TOKENS, SHORT
from server.engine.ipc.link import EngineClient
from server.engine.scheduler import QUIET
from server.messages import Stats, StepOutput
from server.models.executors.base import GivenUpError
from server.settings import Settings
from tests.engine.harness import Outcome, collect, greedy_requests, load, make_core, run
from tests.models_zoo import VOCABULARY, save_tiny

TARGET = 0.01
PER_TOKEN = 0.001  # seconds, so that a usual step has ten tokens or the least that there are


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given_up") / "model"
    return load(save_tiny("llama", folder, max_position_embeddings=2048), weights="int8")


@pytest.fixture
def line():
    """Both ends of what messages come through: the one read, the one written."""
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


def prompt(tokens: int) -> list[int]:
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def quiet_core(packed, arrivals: int | None, **options) -> EngineCore:
    """An engine to which no other request has come for a while, and which knows how long a step takes."""
    plain = make_core(packed, **options)
    core = EngineCore(
        plain.runner,
        context_length=2000,
        max_running=8,
        max_batch_tokens=512,
        prompt_step_seconds=TARGET,
        check_integrity=True,
        arrivals=arrivals,
    )
    observe = core.scheduler.pace.observe
    core.scheduler.pace.observe = lambda work, decodes, seconds: observe(
        work, decodes, work.tokens * PER_TOKEN
    )
    core.scheduler._clock = itertools.count(0.0, QUIET).__next__
    return core


def interrupted(monkeypatch, after: int, write: int) -> list[int]:
    """Has something come after so many calls of each chain that is watched; the calls that each makes."""
    made: list[int] = []
    whole = Chain.run

    def run_some(self: Chain, watched: int | None = None) -> bool:
        if watched is None:
            return whole(self)
        entries = self._entries
        self._entries = entries[:after]
        assert whole(self, watched)
        os.write(write, b"!")
        self._entries = entries[after:]
        ended = whole(self, watched)
        self._entries = entries
        made.append(after)
        return ended

    monkeypatch.setattr(Chain, "run", run_some)
    return made


@pytest.mark.parametrize("after", [0, 1, 4])
def test_the_next_request_has_the_next_step_and_both_have_their_tokens(
    packed, line, monkeypatch, after
) -> None:
    read, write = line
    long, short = greedy_requests([prompt(1200), prompt(16)], 6, logprobs=2)
    expected = run(make_core(packed), [long, short])
    core = quiet_core(packed, read)
    outcomes = {long.id: Outcome(), short.id: Outcome()}
    core.submit(long)
    for _ in range(3):
        collect(core, outcomes)
    assert core.scheduler.given_up
    (sequence,) = core.scheduler.running
    computed, held = sequence.computed, core.kv.pool.held
    assert core.kv.pool.held == core.kv.pages_for(computed)
    with monkeypatch.context() as patch:
        made = interrupted(patch, after, write)
        output = core.step()
        assert made == [after]
        assert not output.sequences
        assert (sequence.computed, core.kv.pool.held) == (computed, held)
        # It is there before any other step ends, also if its own prompt is the one to be given up.
        assert os.read(read, 1) == b"!"
        core.submit(short)
        core.scheduler._clock = lambda: core.scheduler._came
        collect(core, outcomes)
        assert made == [after]
    assert len(outcomes[short.id].tokens) == 1
    for _ in range(200):
        if core.has_work:
            collect(core, outcomes)
    for request in (long, short):
        assert outcomes[request.id].tokens == expected[request.id].tokens
        assert outcomes[request.id].logprobs == expected[request.id].logprobs


def test_a_sequence_whose_first_step_is_given_up_tells_that_it_has_begun_in_the_next(
    packed, line, monkeypatch
) -> None:
    read, write = line
    core = quiet_core(packed, read)
    run(core, greedy_requests([prompt(300)], 2, first_id=1))  # from which the pace is known
    (request,) = greedy_requests([prompt(1200)], 2, first_id=2)
    core.submit(request)
    with monkeypatch.context() as patch:
        interrupted(patch, 3, write)
        assert not core.step().sequences
    os.read(read, 1)
    (first,) = core.step().sequences
    assert first.started is not None


def test_only_long_prompts_by_themselves_are_given_up(packed, line) -> None:
    read, write = line
    os.write(write, b"!")  # something has come all the time
    core = quiet_core(packed, read)
    most = SHORT * GIVEN_UP_TOKENS
    requests = greedy_requests([prompt(100), prompt(90)], 8)
    core.submit(requests[0])
    assert core.step().stats.prompt_tokens  # of which no pace is known
    core.submit(requests[1])
    for _ in range(200):
        if not core.has_work:
            break
        assert core.step().stats.step_seconds
    assert not core.has_work
    core.submit(greedy_requests([prompt(most + 600)], 2, first_id=9)[0])
    assert not core.step().stats.prompt_tokens
    os.read(read, 1)
    assert core.step().stats.prompt_tokens >= GIVEN_UP_TOKENS


@pytest.mark.parametrize("reason", ["nothing to watch", "selection keeps summaries"])
def test_where_a_step_cannot_be_given_up_it_has_its_former_size(packed, line, reason) -> None:
    read, write = line
    os.write(write, b"!")
    topk = {"pattern": "topk", "budget": "48", "recent_pages": "1", "dense_layers": ""}
    if reason == "nothing to watch":
        core = quiet_core(packed, None)
    else:
        core = quiet_core(packed, read, backend="sparse", options=topk)
    core.submit(greedy_requests([prompt(1200)], 2)[0])
    for _ in range(6):
        assert core.step().stats.prompt_tokens
        assert not core.scheduler.given_up


def test_the_runner_says_that_a_step_was_given_up(packed, line) -> None:
    read, write = line
    core = make_core(packed)
    core.submit(greedy_requests([prompt(40)], 2)[0])
    scheduled = core.scheduler.schedule()
    os.write(write, b"!")
    with pytest.raises(GivenUpError):
        core.runner.launch(scheduled, None, read)
    os.read(read, 1)
    assert core.runner.launch(scheduled, None, read).sampled is not None


async def test_a_request_reaches_the_engine_process_in_the_middle_of_a_step(default_model) -> None:
    # A usual step would be about as long as a few tokens take; these have 64 at least.
    settings = Settings(threads=1, kv_memory="256MiB", prefix_cache=False, prompt_step_ms=5)
    long, short = greedy_requests([prompt(6000), prompt(16)], 1)
    steps: list[Stats] = []
    stepped = asyncio.Event()

    def on_step(output: StepOutput) -> None:
        steps.append(output.stats)
        stepped.set()

    client = EngineClient(settings, default_model)
    client.on_step = on_step
    try:
        await client.start()
        await client.wait_ready()
        client.submit([long])
        while len(steps) < 3:
            stepped.clear()
            await asyncio.wait_for(stepped.wait(), 60)
        await asyncio.sleep(0.02)
        stream = client.submit([short])
        ((output, _),) = await asyncio.wait_for(stream.take(1), 60)
        assert output.finish is not None
    finally:
        await client.stop()
    nothing = [i for i, stats in enumerate(steps) if stats.prompt_tokens + stats.decode_tokens == 0]
    assert len(nothing) == 1
    assert steps[nothing[0] + 1].prompt_tokens == len(short.prompt)
    assert steps[nothing[0] - 1].prompt_tokens >= GIVEN_UP_TOKENS
