"""Client processes against a real gRPC server, whose engine is a scripted one."""

import asyncio
import contextlib
import itertools
import math

import psutil
import pytest

from loadtest.load import driver, reconcile, worker
from loadtest.load.measures import summarize
from loadtest.load.targets import Server
from loadtest.load.types import ClosedLoop, OpenLoop, Session, Turn
from loadtest.load.workloads import WORKLOADS, Shape

SHAPE = Shape(sessions=12, prompt_tokens=9, output_tokens=6, vocabulary=250, context=200)


async def drive(port, sessions, load, workers=2, **options):
    return await asyncio.to_thread(
        driver.run, Server("127.0.0.1", port), sessions, load, workers=workers, **options
    )


async def test_a_closed_loop_sends_all_and_times_them(served):
    running, port, _ = served
    running.engine.step_seconds = 0.005
    seen = []
    outcome = await drive(port, WORKLOADS["fixed"](SHAPE), ClosedLoop(4), listener=seen.append)
    assert not outcome.interrupted
    assert sorted(record.session for record in outcome.records) == list(range(12))
    assert {record.code for record in outcome.records} == {"OK"}
    for record in outcome.records:
        assert (record.prompt_tokens, record.tokens, record.error) == (9, 6, "")
        assert (
            record.intended <= record.sent < record.arrivals[0][0] <= record.arrivals[-1][0] <= record.ended
        )
    assert len(outcome.workers) == 2
    most = max(
        sum(other.sent <= record.sent < other.ended for other in outcome.records)
        for record in outcome.records
    )
    assert most <= 4
    assert all(
        request.sampling.greedy and not request.sampling.penalized for request in running.engine.submitted
    )


async def test_an_open_loop_keeps_its_times_independent_of_the_server(served):
    running, port, _ = served
    running.engine.step_seconds = 0.02
    outcome = await drive(port, WORKLOADS["fixed"](SHAPE), OpenLoop(40.0, math.inf), seed=1)
    starts = sorted(record.intended for record in outcome.records)
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert gaps == pytest.approx([1 / 40] * 11, abs=1e-6)
    assert all(record.delay >= 0 for record in outcome.records)


async def test_no_session_begins_after_the_duration(served):
    _, port, _ = served
    outcome = await drive(port, WORKLOADS["fixed"](SHAPE), OpenLoop(10.0, math.inf), 1, most_seconds=0.35)
    assert len(outcome.records) == 4


async def test_a_conversation_carries_its_answers_on(served):
    running, port, _ = served
    sessions = [Session(0, (Turn([("user", "first")], 3), Turn([("user", "second")], 3)))]
    outcome = await drive(port, sessions, ClosedLoop(1))
    assert [record.turn for record in outcome.records] == [0, 1]
    first, second = (bytes(request.prompt).decode() for request in running.engine.submitted)
    assert first == "user:first\n"
    answer = second.removeprefix("user:first\nassistant:").partition("\n")[0]
    assert len(answer) == 3
    assert second == f"user:first\nassistant:{answer}\nuser:second\n"


async def test_a_refusal_of_the_server_is_a_failure(served):
    _, port, _ = served
    sessions = [Session(0, (Turn([5] * 300, 6),)), Session(1, (Turn([5] * 3, 6),))]
    outcome = await drive(port, sessions, ClosedLoop(1))
    assert summarize(outcome.records).failed == {"INVALID_ARGUMENT": 1}
    assert "300 tokens" in outcome.records[0].error


async def test_an_answer_of_the_wrong_length_is_a_failure(served):
    _, port, _ = served
    sessions = [Session(0, (Turn([5] * 198, 6),))]  # the context of 200 cuts it short
    outcome = await drive(port, sessions, ClosedLoop(1))
    assert sum(summarize(outcome.records).failed.values()) == 1


async def test_an_interrupt_stops_the_run_and_keeps_its_records(served):
    running, port, _ = served
    running.engine.open.clear()
    caught = []

    def interrupt(progress):
        if progress.sent and not caught:
            caught.append(progress)
            raise KeyboardInterrupt

    outcome = await drive(port, WORKLOADS["fixed"](SHAPE), ClosedLoop(3), listener=interrupt)
    assert outcome.interrupted
    assert {record.code for record in outcome.records} == {"CANCELLED"}
    assert len(outcome.records) == 3


async def test_a_server_that_hangs_ends_the_run(served):
    running, port, _ = served
    running.engine.open.clear()
    outcome = await drive(port, WORKLOADS["fixed"](SHAPE), ClosedLoop(3), 1, patience=0.6)
    assert not outcome.interrupted
    assert {record.code for record in outcome.records} == {worker.SILENT}
    assert len(outcome.records) == 3, "nothing more is sent"
    assert all(0.6 < record.latency < 30 for record in outcome.records)
    assert "sent nothing for 0.6 seconds while requests waited" in outcome.records[0].error


async def test_a_server_that_is_slow_but_sends_does_not_hang(served):
    running, port, _ = served
    running.engine.step_seconds = 0.2
    # The last of them wait for longer than the patience, and are answered.
    outcome = await drive(port, WORKLOADS["fixed"](SHAPE), ClosedLoop(2), 1, patience=1.0)
    assert {record.code for record in outcome.records} == {"OK"}
    assert max(record.ended for record in outcome.records) - outcome.records[0].sent > 2.0


async def test_an_address_without_a_server_is_said():
    with pytest.raises(driver.WorkerDiedError, match="does the server answer"):
        await drive(1, WORKLOADS["fixed"](SHAPE), ClosedLoop(1))


async def test_requests_of_another_client_show_as_a_disagreement(served):
    running, port, metrics_port = served
    url = f"http://127.0.0.1:{metrics_port}/metrics"
    before = await asyncio.to_thread(reconcile.scrape, url)
    outcome = await drive(port, WORKLOADS["fixed"](SHAPE), ClosedLoop(2), 1)
    await running.generate()
    side = reconcile.server_side(before, await asyncio.to_thread(reconcile.scrape, url))
    assert any(
        "did another client use it" in line
        for line in reconcile.disagreements(summarize(outcome.records), side)
    )


def client_processes():
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # one that has ended
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


async def test_client_processes_leave_signals_to_their_parent(served):
    running, port, _ = served
    running.engine.step_seconds = 0.02
    told = []

    def end(progress):
        if progress.sent and not told:
            told.extend(client_processes())
            for child in told:
                child.terminate()

    outcome = await drive(port, WORKLOADS["fixed"](SHAPE), ClosedLoop(2), listener=end)
    assert len(told) == 2
    assert {record.code for record in outcome.records} == {"OK"}


async def test_a_client_process_that_is_killed_is_named(served):
    running, port, _ = served
    running.engine.step_seconds = 0.02

    def end(progress):
        for child in client_processes() if progress.sent else ():
            child.kill()

    with pytest.raises(driver.WorkerDiedError, match="exit code -9 midway"):
        await drive(port, WORKLOADS["fixed"](SHAPE), ClosedLoop(2), listener=end)


def test_no_process_is_left():
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if "spawn_main" in " ".join(child.cmdline())]
