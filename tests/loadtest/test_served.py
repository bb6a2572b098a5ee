"""Servers as targets: requests, counts and refusals. Real servers of a small random model."""

import asyncio
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from loadtest.deployment import FULL, Deployment, window
from loadtest.measuring import served
from loadtest.measuring.busy import busy
from loadtest.measuring.rounds import Rounds
from loadtest.measuring.servers import OpenError, groups, most_at_once, open_all
from loadtest.measuring.types import CannotMeasureError, Load
from loadtest.servers import NotStartedError, serve
from longspan import Client, LongspanError
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
def targets(arguments):
    with open_all([FULL, WINDOW], arguments, 1 << 21) as opened:
        yield opened


def at_work(target):
    """Sequences that run and that wait."""
    with Client(target.host, target.port) as client:
        load = client.server_info().load
        return load.running, load.waiting


@pytest.mark.parametrize("name", ["full", WINDOW.name])
@pytest.mark.parametrize(
    "load",
    [
        CACHED,
        replace(CACHED, concurrency=3),
        replace(CACHED, rate=50.0, concurrency=0, requests=3),
        NEW,
        replace(NEW, concurrency=2, requests=4),
        replace(NEW, rate=50.0, concurrency=0, requests=3),
    ],
    ids=lambda load: load.label,
)
def test_every_load_gives_its_figures_and_leaves_an_idle_server(targets, name, load):
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


def test_a_core_that_another_process_keeps_busy_is_noticed(targets):
    # The shell has ended when it is measured, so that what it started descends from this process no more.
    spin = f"{shlex.quote(sys.executable)} -c 'while True: pass' >/dev/null & echo $!"
    pid = int(subprocess.run(["sh", "-c", spin], stdout=subprocess.PIPE, check=True).stdout)
    try:
        rounds = Rounds(targets, [Load(CONTEXT, 400, concurrency=4, requests=8, cached=True)])
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


def test_why_a_server_did_not_start_is_said_without_its_log():
    with pytest.raises(NotStartedError) as refused, serve("--attention", "sliding_windw"):
        pass
    start, why = str(refused.value).split(" did not start: ")
    assert start == "longspan serve --attention sliding_windw"
    assert why.startswith("there is no attention backend 'sliding_windw'; ")
    assert "INFO" not in why
