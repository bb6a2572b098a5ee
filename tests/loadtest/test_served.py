"""Servers as targets: requests, counts and refusals. Real servers of a small random model."""

import asyncio
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from loadtest.compare.plan import Asked, make_plan
from loadtest.compare.preflight import look
from loadtest.deployment import FULL, Deployment, window
from loadtest.measuring import served
from loadtest.measuring.busy import busy
from loadtest.measuring.rounds import Rounds
from loadtest.measuring.servers import OpenError, groups, most_at_once, open_all
from loadtest.measuring.types import CannotMeasureError, Load
from longspan import Client, DeadlineError, LongspanError
from tests.models_zoo import CONTEXT

pytestmark = pytest.mark.long

WINDOW = window(48, 16)
CACHED = Load(384, 192, cached=True)
# Long enough that their tokens do not come in one message where the client is slow.
NEW = Load(256, 192)


@pytest.fixture(scope="module")
def arguments(tiny_packed):
    return (*tiny_packed, "--max-context", str(CONTEXT))


@pytest.fixture(scope="module")
def opened(arguments):
    """Both servers, and what ends them."""
    with ExitStack() as ends:
        yield ends.enter_context(open_all([FULL, WINDOW], arguments, 1 << 21)), ends


@pytest.fixture(scope="module")
def targets(opened):
    return opened[0]


def at_work(target):
    """Sequences that run and that wait."""
    with Client(target.host, target.port) as client:
        load = client.server_info().load
        return load.running, load.waiting


# Each kind of load on one of both, new and cached prompts on each; all on both in `make stress`.
LOADS = (
    (CACHED, FULL.name),
    (replace(CACHED, concurrency=3), WINDOW.name),
    (replace(CACHED, rate=50.0, concurrency=0, requests=3), FULL.name),
    (NEW, WINDOW.name),
    (replace(NEW, concurrency=2, requests=4), FULL.name),
    (replace(NEW, rate=50.0, concurrency=0, requests=3), WINDOW.name),
)


@pytest.mark.parametrize(
    ("load", "name"),
    [
        pytest.param(
            load, name, marks=() if name == short else pytest.mark.stress, id=f"{load.label}, {name}"
        )
        for load, short in LOADS
        for name in (FULL.name, WINDOW.name)
    ],
)
def test_every_load_gives_its_figures_and_leaves_an_idle_server(targets, load, name):
    figures = targets[name].measure(load, 1)
    wanted = {"tpot", "output_rate"} | (set() if load.cached else {"ttft", "prefill_rate"})
    assert figures.keys() == wanted
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert at_work(targets[name]) == (0, 0)


def test_prompts_that_are_not_cached_are_sent_first_and_the_cell_only_decodes(targets):
    seen = []
    target = targets["full"]
    send = target._send

    def spy(load, prompts, seed):
        records = send(load, prompts, seed)
        seen.append((prompts, [record.cached_tokens for record in records]))
        return records

    target._send = spy
    try:
        load = Load(300, 8, concurrency=2, requests=4, cached=True)
        target.measure(load, 7)
        target.measure(load, 8)
    finally:
        del target._send
    known = (300 - 8 - 1) // 16 * 16
    assert [cached for _, cached in seen] == [[known] * 4] * 2
    prompts = [prompt for sent, _ in seen for prompt in sent]
    assert {len(prompt) for prompt in prompts} == {292}
    # Two users with beginnings of their own, and a last page that is new each time.
    assert len({tuple(prompt[:known]) for prompt in prompts}) == 2
    assert len({tuple(prompt[known:]) for prompt in prompts}) == 8


def test_the_same_seed_is_the_same_work_for_all_and_is_refused_where_it_is_cached(targets):
    load = Load(160, 4, concurrency=1, requests=2)
    for target in targets.values():
        target.measure(load, 99)
        with pytest.raises(CannotMeasureError, match="another seed"):
            target.measure(load, 99)


def test_a_cache_that_cannot_keep_the_prompts_is_said(targets):
    target = targets["full"]
    with Client(target.host, target.port) as client:
        load = client.server_info().load
    known = 400 // load.page_size * load.page_size
    # One more than there are pages for.
    users = load.pages_total * load.page_size // known + 1
    with pytest.raises(CannotMeasureError, match=rf" of {users} prompts of {known} tokens.*--kv-memory"):
        target.measure(Load(known + 3, 2, users, cached=True), 0)
    with pytest.raises(LongspanError):
        target.measure(Load(2 * CONTEXT, 8), 0)
    with pytest.raises(CannotMeasureError, match="no room for a prompt"):
        target.measure(Load(8, 8), 0)


def test_rounds_over_real_servers_know_whose_time_is_whose(targets):
    rounds = Rounds(targets, [Load(448, 32, cached=True)])
    made = rounds.step(rounds._loads[0])
    assert not rounds.failed
    assert {each.deployment for each in made} == {"full", WINDOW.name}
    assert all(0 <= each.weather.foreign <= 1 for each in made)
    assert not any(str(target.pids[0]) in each.disturbed for each in made for target in targets.values())


def test_a_core_that_another_process_keeps_busy_is_noticed(targets, monkeypatch):
    monkeypatch.setattr("loadtest.measuring.rounds.MOST_REPEATS", 0)  # they would be as disturbed
    # The shell has ended when it is measured, so that what it started descends from this process no more.
    spin = f"{shlex.quote(sys.executable)} -c 'while True: pass' >/dev/null & echo $!"
    pid = int(subprocess.run(["sh", "-c", spin], stdout=subprocess.PIPE, check=True).stdout)
    try:
        rounds = Rounds(targets, [Load(CONTEXT, 200, concurrency=4, requests=4, cached=True)])
        rounds.run(600, lambda load: rounds.rounds[load.label] == 1)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert not rounds.failed
    assert all(each.disturbed for each in rounds.measurements)
    assert "other processes used" in busy(rounds.measurements)


def test_all_that_refuse_to_start_are_named_and_none_is_left(arguments):
    before = set(psutil.Process().children(recursive=True))
    wrong = [
        Deployment("nonsense", "sliding_window", {"window": "none"}),
        Deployment("odd", "sparse", {"x": "1"}),
    ]
    with pytest.raises(OpenError) as caught, open_all([FULL, *wrong], arguments):
        pass
    assert caught.value.reasons.keys() == {"nonsense", "odd"}
    assert "nonsense: " in str(caught.value)
    assert "odd: " in str(caught.value)
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.is_running() and "server.cli" in process.cmdline()]


def test_ctrl_c_ends_all_servers(arguments):
    program = (
        "import sys, time\n"
        "from loadtest.deployment import FULL\n"
        "from loadtest.measuring.servers import open_all\n"
        "from loadtest.measuring.types import Load\n"
        "with open_all([FULL], sys.argv[1:], 1 << 20) as opened:\n"
        "    print(opened['full'].pids[0], flush=True)\n"
        "    while True:\n"
        "        opened['full'].measure(Load(500, 400, 4), time.monotonic_ns())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        time.sleep(0.2)  # somewhere within a cell
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


def test_a_cell_ends_when_nothing_runs_or_waits_any_more():
    left = [(1, 0), (0, 1), (0, 0), (1, 0)]

    class Client:
        async def server_info(self, **options):
            running, waiting = left.pop(0)
            return SimpleNamespace(load=SimpleNamespace(running=running, waiting=waiting))

    target = object.__new__(served.Served)
    target._client = Client()
    asyncio.run(target._idle())
    assert left == [(1, 0)]


def test_groups_have_the_base_and_as_many_as_memory_holds(targets, monkeypatch):
    names = [Deployment(name) for name in "abcde"]
    assert ["".join(each.name for each in group) for group in groups(names, 3)] == ["abc", "ade"]
    assert ["".join(each.name for each in group) for group in groups(names, 1)] == ["ab", "ac", "ad", "ae"]
    assert groups(names[:1], 4) == [(names[0],)]
    pid = targets["full"].pids[0]
    assert most_at_once(pid, 1 << 21, 3) == 3
    assert most_at_once(pid, 1 << 50, 3) == 1
    assert most_at_once(os.getpid(), 1 << 40, 10_000) < 10_000


def test_only_memory_decides_how_many_servers_are_at_once(arguments, targets, monkeypatch):
    monkeypatch.setattr("loadtest.compare.preflight.open_all", lambda *_: nullcontext(targets))
    asked = {"contexts": [CONTEXT], "tasks": ["niah_single_1"], "candidates": ["sliding_window"]}
    plan, material = make_plan(Asked(**asked, arguments=list(arguments)))
    assert len(plan.candidates) == 2
    assert look(plan, material, str).at_once > 2, "a file that it goes on with may have more candidates"


# The last one: no other has servers after it.
def test_an_engine_that_hangs_fails_its_candidate_and_is_ended(opened, monkeypatch):
    monkeypatch.setattr("loadtest.servers._STOP_SECONDS", 3.0)
    monkeypatch.setattr("loadtest.servers._ENGINE_SECONDS", 1.0)
    targets, ends = opened
    hanging, load = targets[WINDOW.name], Load(CONTEXT, 8, 1, requests=1)
    (pid,) = hanging.pids
    engines = psutil.Process(pid).children(recursive=True)
    for engine in engines:
        engine.send_signal(signal.SIGSTOP)
    rounds = Rounds(targets, [load])
    hanging.allow(5.0)  # the other one may take its time on a busy machine
    rounds.step(load)
    assert list(rounds.failed) == [(load.label, WINDOW.name)]
    assert "hangs" in rounds.failed[load.label, WINDOW.name]
    with Client(hanging.host, hanging.port) as client:
        client.timeout = 2.0
        with pytest.raises(DeadlineError):
            client.generate([5] * 40, max_tokens=4)
    ends.close()
    assert not [each for each in engines if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert not psutil.pid_exists(pid)
