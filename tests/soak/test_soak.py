"""A server holds under load, faults and hostile inputs at once; what a run is judged by can fail."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from longspan import FinishReason, LongspanError
from tests.e2e.here import serving
from tests.kernels import share_kernels
from tests.models_zoo import save_tiny
from tests.soak import bounds
from tests.soak.__main__ import _JUDGED_MINUTES, plan_of
from tests.soak.bounds import End, Limits, judge
from tests.soak.encoders import ENCODER_KILLED, EncoderLoad, Request
from tests.soak.filling import Filler
from tests.soak.inputs import FIELDS, inputs
from tests.soak.record import Memory, Record
from tests.soak.report import document, table
from tests.soak.run import Plan, _Load, run
from tests.soak.schedule import schedule
from tests.soak.traffic import Question, Users

pytestmark = pytest.mark.long

ENGINES, OTHERS = ("engine killed", "engine hangs"), ("a", "b", "c")
# The tests beside this one may take the cores for seconds.
LIMITS = Limits(
    answers=2,
    hostile=400,
    gap=10.0,
    health=5.0,
    noticed={"engine killed": 5.0, "engine hangs": 10.0},
    ready=60.0,
    growth=None,
)
# A slow machine does not get through all fields in seven seconds.
JUDGED = replace(LIMITS, hostile=100, fields=len(FIELDS) // 4, growth=1e9)


@pytest.fixture
def small(tmp_path):
    """A model whose streams last longer than a window."""
    model = save_tiny("llama", tmp_path / "llama", max_position_embeddings=4096)
    cache = share_kernels(tmp_path / "cache")
    return ["--model", model, "--weights", "int8", "--cache-dir", cache, "--threads", "1"]


def assert_holds(plan: Plan, folder) -> None:
    result = run(plan, folder)
    broken = [bound for bound in result.bounds if not bound.holds]
    assert not broken, f"seed {plan.seed}: {broken}\n{table(plan, result)}"
    assert len(document(plan, result)["windows"]) == len(result.record.windows) - 1


def test_a_server_holds(small, tmp_path, monkeypatch):
    # That memory is looked at, from where the cache is full on, is tried; a short run tells nothing of it.
    monkeypatch.setattr(bounds, "_SERIES_SECONDS", 0.5)
    seed = random.SystemRandom().randrange(1 << 32)
    assert_holds(
        Plan(seed, 7.0, 1.0, 70, 2.0, ["--kv-memory", "4MiB", "--speculate", "ngram", *small], JUDGED),
        tmp_path,
    )


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_the_default_model_holds_for_a_minute(tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    assert_holds(plan_of(1, seed, []), tmp_path)


def test_a_seed_gives_the_same_run():
    first, second = (inputs(random.Random(5)) for _ in range(2))
    assert [next(first) for _ in range(300)] == [next(second) for _ in range(300)]
    drawn = [schedule(random.Random(5), 40, ENGINES, OTHERS) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_engines_are_left_alone_in_the_last_part():
    drawn = schedule(random.Random(1), 40, ENGINES, OTHERS)
    assert {*drawn[:6]} == {*drawn[:24]} == {*ENGINES, *OTHERS, "none"}
    assert not {*ENGINES} & {*drawn[24:]}


async def test_every_engine_is_left_alone_for_as_long_as_its_memory_is_to_be_seen(monkeypatch):
    drawn: list[str] = []

    async def note(self, fault, faults):
        drawn.append(fault)

    monkeypatch.setattr(_Load, "_window", note)
    plan = plan_of(_JUDGED_MINUTES, 1, [])
    load = _Load(replace(plan, limits=LIMITS), {"server": None, "masks": None}, {}, Record())
    await load._windows(random.Random(1), context=1000)
    lost = [index for index, fault in enumerate(drawn) if fault in plan.limits.noticed]
    assert {drawn[index] for index in lost} == {*ENGINES, ENCODER_KILLED}
    assert (len(drawn) - 1 - max(lost)) * plan.window >= 2 * bounds._SERIES_SECONDS


def good() -> tuple[Record, End]:
    """A run that holds."""
    record = Record()
    for fault in ("none", *ENGINES):
        window = record.begin(fault)
        window.real["stream", "OK"] = window.compared = 5
        window.gaps, window.health = [0.1], [0.01]
        window.hostile["INVALID_ARGUMENT"] = 400
    for window in record.windows[2:]:
        window.found = {"streams ended after": 0.1, "ready again after": 1.0}
    record.fields, record.sent = set(FIELDS), 9
    record.strangers["UNAUTHENTICATED"] = 3
    return record, End(9, 9, 9, 0, (20, 20), 2, 0, 0, 0)


def test_a_good_run_holds():
    record, end = good()
    assert all(bound.holds for bound in judge(record, LIMITS, end))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record, end: record.now.wrong.append("a token"),
        lambda record, end: record.now.real.clear(),
        lambda record, end: record.now.gaps.clear(),
        lambda record, end: record.now.health.append(60.0),
        lambda record, end: record.now.hostile.update(INTERNAL=1),
        lambda record, end: record.now.real.update({("unary", "UNKNOWN"): 1}),
        lambda record, end: record.now.found.clear(),
        lambda record, end: record.fields.pop(),
        lambda record, end: record.strangers.update(OK=1),
        lambda record, end: record.strangers.clear(),
        lambda record, end: [window.hostile.clear() for window in record.windows],
        lambda record, end: end._replace(counted=8),
        lambda record, end: end._replace(pages=1),
        lambda record, end: end._replace(descriptors=(20, 40)),
        lambda record, end: end._replace(restarts=1),
        lambda record, end: end._replace(exit_code=1),
        lambda record, end: end._replace(processes=1),
        lambda record, end: end._replace(tracebacks=1),
    ],
)
def test_each_bound_can_fail(spoil):
    record, end = good()
    spoiled = spoil(record, end)
    bounds = judge(record, LIMITS, spoiled if isinstance(spoiled, End) else end)
    assert sum(not bound.holds for bound in bounds) in (1, 2)


def test_growth_is_judged_in_the_engine_that_served_longest():
    record, end = good()
    limits = Limits(**{**vars(LIMITS), "growth": 40.0})
    assert [bound.found for bound in judge(record, limits, end)][-2:] == ["never", "never"]
    mib = 1 << 20
    record.server = [Memory(second, 1, 100 * mib) for second in range(600)]
    record.engine = [Memory(second, 2, 10 * second * mib) for second in range(200)]
    record.engine += [Memory(second, 3, (200 + second // 60) * mib) for second in range(200, 1000)]
    record.full = {2: 0.0, 3: 200.0}
    server, engine = judge(record, limits, end)[-2:]
    assert server.holds
    assert not engine.holds, "a MiB each minute is 60 each hour"
    record.encoders["masks: engine"] = record.engine
    assert [bound.holds for bound in judge(record, limits, end)][-3:] == [True, False, False]


@pytest.mark.parametrize(
    ("leak", "written", "full", "holds"),
    [
        (0, 300, {7: 300.0}, True),
        (100, 300, {7: 300.0}, False),
        (100, 300, {7: 0.0}, False),
        # Pages that are first written while the bound looks are growth like any other.
        (0, 1000, {7: 0.0}, False),
        # What was full too late, or never, or is another engine, tells nothing.
        (0, 300, {7: 700.0}, False),
        (0, 300, {}, False),
        (0, 300, {6: 300.0}, False),
    ],
)
def test_growth_begins_where_the_kv_cache_is_full(leak, written, full, holds):
    """An engine that leaks so many MiB an hour, and has written all pages of its cache after some seconds."""
    record, end = good()
    mib = 1 << 20
    record.server = [Memory(second, 1, 100 * mib) for second in range(1000)]
    record.engine = [
        Memory(second, 7, int((456 + 256 * min(1, second / written) + leak * second / 3600) * mib))
        for second in range(1000)
    ]
    record.full = full
    server, engine = judge(record, replace(LIMITS, growth=40.0), end)[-2:]
    assert server.holds
    assert engine.holds == holds, engine


class Pages:
    """A client of an engine with 100 pages of 16 tokens; its third call finds the engine lost."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.prompts: list[list[int]] = []

    async def model_info(self):
        return SimpleNamespace(context_length=512, vocabulary_size=1000)

    async def server_info(self):
        return SimpleNamespace(load=SimpleNamespace(page_size=16, pages_total=100))

    async def generate(self, prompt, **_):
        self.prompts.append(prompt)
        if len(self.prompts) == 3:
            self.record.engine.append(Memory(1.0, 8, 0))
            raise LongspanError("The engine ended.")


async def fill(client, record: Record) -> None:
    filler = Filler(client, record, random.Random(1))
    async with asyncio.TaskGroup() as group:
        group.create_task(filler.run())
        while not record.full:  # noqa: ASYNC110 (a record sends no event)
            await asyncio.sleep(0.01)
        filler.ended = True


async def test_a_filled_cache_has_no_page_that_was_never_used(tiny):
    with serving(model=str(tiny), kv_memory="2MiB", threads=1) as server:
        record = Record()
        record.engine.append(Memory(0.0, 1, 0))
        async with server.aclient() as client:
            await fill(client, record)
            load = (await client.server_info()).load
    # The last page of a prompt is not full, so that it is not cached; the next prompt takes it first.
    assert load.pages_total - 1 <= load.pages_cached + load.pages_used <= load.pages_total
    assert load.pages_total > 200


async def test_each_engines_cache_is_filled_with_prompts_that_fill_it():
    record = Record()
    record.engine.append(Memory(0.0, 7, 0))
    client = Pages(record)
    await fill(client, record)
    assert {*record.full} == {8}, "the engine that was lost has never been full"
    written = [len(prompt) // 16 for prompt in client.prompts[3:]]
    assert sum(written[:-1]) < 100 <= sum(written)
    assert len({tuple(prompt[:16]) for prompt in client.prompts}) == len(client.prompts)


@pytest.mark.parametrize(("found", "noted"), [([1.0, 2.0], 0), ([1.0, 2.001], 1), ([1.0], 1)])
def test_an_encoders_other_numbers_are_noted(found, noted):
    record = Record()
    record.begin("none")
    load = EncoderLoad("masks", None, record, None)
    load._compare(Request("embed", ["x"]), found, [1.0, 2.00001])
    assert len(record.now.wrong) == noted
    assert record.now.compared == 1


@pytest.mark.parametrize(
    ("deltas", "noted"),
    [
        ([((1, 2), "ab", None), ((3,), "c", FinishReason.LENGTH)], 0),
        ([((1,), "a", FinishReason.ABORTED)], 2),
        ([((1,), "a", None)], 2),
        ([((1, 2, 3), "abd", FinishReason.LENGTH)], 1),
        ([((1, 2, 4), "abc", FinishReason.STOP)], 1),
    ],
)
async def test_an_answer_that_is_short_or_other_is_noted(deltas, noted):
    async def given():
        for ids, text, reason in deltas:
            yield SimpleNamespace(token_ids=list(ids), text=text, finish_reason=reason)

    @asynccontextmanager
    async def stream(*_, **__):
        yield given()

    record = Record()
    record.begin("none")
    question = Question("x", 3, [1, 2, 3], "abc")
    await Users(SimpleNamespace(stream=stream), [question], record)._stream(question)
    assert len(record.now.wrong) == noted
