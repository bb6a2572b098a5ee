"""Servers that start, break, drain and end: a small random model in the real processes."""

import asyncio
import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from longspan import BusyError, DeadlineError, LongspanError, UnavailableError
from tests.api.conftest import until
from tests.e2e.server import Server
from tests.processes import wait_ended, wait_until

pytestmark = pytest.mark.long

# A second or more, and within the model's context.
ENDLESS = {"max_tokens": 1000, "ignore_eos": True, "temperature": 0}


# Servers with settings that several tests have in common; the last of these tests ends its server.
FULL = ("--max-running", "1", "--max-queue", "1")
WINDOW = (
    *("--attention", "sliding_window", "--attention-option", "window=64", "--attention-option", "sinks=4"),
    *("--no-prefix-cache", "--max-running", "1"),
)
# 2 layers of 2 key and value heads of 16 numbers, 2 bytes each: a page of 4 tokens takes 1 KiB.
TIGHT = (
    *("--page-size", "4", "--kv-memory", "150KiB", "--no-prefix-cache"),
    *("--max-context", "512", "--drain-seconds", "0.5"),
)


@pytest.fixture(scope="module")
def shared(tiny_packed):
    """One server of the tiny model, for all tests that leave it as they found it; it ends cleanly."""
    with Server(*tiny_packed, "--max-running", "32") as running:
        engine = psutil.Process(running.engine_pid)
        yield running
        assert running.stop(signal.SIGINT) == 0
        wait_ended(engine, 20)


def in_background(call):
    """Runs ``call`` in a thread of its own."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def read_until_error(server, started_event):
    """Reads an endless stream; how it failed and when."""
    with server.client() as client:
        try:
            for _ in client.stream("hello", **ENDLESS):
                started_event.set()
        except LongspanError as error:
            return error, time.monotonic()
    return None, time.monotonic()


def restarts(server, cause):
    """How often another engine was started, for this cause."""
    return server.metrics().get(f'longspan_engine_restarts_total{{reason="{cause}"}}', 0)


def test_it_listens_on_loopback_alone(shared):
    with shared.client() as client:
        assert client.health()
        assert client.models() == [shared.name]
    assert shared.host == "127.0.0.1"
    listening = [c for c in psutil.Process(shared.process.pid).net_connections() if c.status == "LISTEN"]
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}


def test_a_deadline_frees_the_pages(shared):
    computed = "longspan_engine_step_batch_tokens_sum"
    before = shared.metrics()[computed]
    with shared.client() as client, pytest.raises(DeadlineError):
        client.generate("hello", timeout=0.2, **ENDLESS)
    shared.wait_idle()
    assert shared.metrics()[computed] < before + ENDLESS["max_tokens"]


def test_abort_ends_a_stream_with_its_reason(shared):
    with shared.client() as client:
        stream = client.stream("hello", request_id="mine", **ENDLESS)
        seen, aborted = 0, False
        for delta in stream:
            seen += len(delta.token_ids)
            if seen >= 5 and not aborted:
                aborted = client.abort("mine")
        assert aborted
        assert stream.finish_reason == "aborted"
        assert not client.abort("mine")
    shared.wait_idle()


async def test_hundreds_of_cancellations_in_a_row_leave_nothing_behind(shared):
    await shared.cancel_many(400, random.Random(0))
    shared.wait_idle()


def test_no_request_however_extreme_harms_the_engine(shared):
    extremes = [
        {"temperature": 1e-45, "top_p": 1e-45, "top_k": 2**32 - 1, "min_p": 1.0},
        {"temperature": 3e38, "repetition_penalty": 100.0, "presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 0.01, "logit_bias": dict.fromkeys(range(320), -100)},
        {"logit_bias": {7: 100, 8: -100}, "seed": 2**64 - 1, "priority": -(2**31), "n": 16},
        {"min_tokens": 5, "stop_token_ids": list(range(64, 320)), "logprobs": 20, "prompt_logprobs": 20},
        {"stop": ["\ufffd", "a" * 1000, "🙂"], "ignore_eos": True, "keep_special_tokens": True},
        {"max_tokens": 2**32 - 1, "min_tokens": 2**32 - 1},
    ]
    with shared.client() as client:
        calm = client.generate("hello", max_tokens=20, temperature=0)
        for options in extremes:
            answer = client.generate([5] * 300, **{"max_tokens": 12, **options})
            assert answer.usage.completion_tokens >= 1
        again = client.generate("hello", max_tokens=20, temperature=0)
    assert list(again.token_ids) == list(calm.token_ids)


def test_a_second_server_on_the_same_port_is_refused(shared, tiny_packed):
    second = subprocess.run(
        [
            *(sys.executable, "-m", "server.cli", "serve", *tiny_packed),
            *("--port", str(shared.port), "--metrics-port", "0"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"longspan: gRPC can't listen on 127.0.0.1:{shared.port} (Address already in use)")
    assert "--port" in line


def test_a_model_that_is_not_there_is_refused_with_a_sentence(tiny_packed):
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        *tiny_packed,
        "--port",
        "0",
        "--metrics-port",
        "0",
    ]
    result = subprocess.run(
        [*command, "--model", "/nowhere/at/all"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "/nowhere/at/all" in result.stderr
    assert "Traceback" not in result.stderr


def test_short_of_pages_streams_are_preempted_and_still_say_the_same(shared, started):
    tight = started(*TIGHT)

    def ask(server):
        def one(i):
            with server.client() as client:
                answer = client.generate([10 + i] * 20, max_tokens=60, temperature=0, ignore_eos=True)
                return list(answer.token_ids)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(one, range(16)))

    assert ask(tight) == ask(shared)
    assert tight.metrics()["longspan_preemptions_total"] > 0
    tight.wait_idle()


def test_a_window_is_served_as_configured_and_keeps_few_pages(started):
    server = started(*WINDOW)
    with server.client() as client:
        attention = client.model_info().attention
        assert (attention.backend, attention.pattern) == ("sliding_window", "sliding_window")
        assert dict(attention.options) == {
            **{"window": "64", "sinks": "4", "positions": "original"},
            "dense_layers": "",
        }
        stream = client.stream("hello", **{**ENDLESS, "max_tokens": 4 * 64})
        used = [client.server_info().load.pages_used for _ in stream]
    assert max(used) <= 1 + 64 // 16 + 2
    assert 'attention_backend="sliding_window"' in "".join(server.metrics())
    server.wait_idle()


async def test_what_expires_in_the_queue_is_never_computed(started):
    server = started(*WINDOW)
    computed = "longspan_engine_step_batch_tokens_sum"
    before = server.metrics()[computed]
    async with server.aclient() as client:
        holding = [asyncio.create_task(client.generate([5] * 9, **ENDLESS)) for _ in range(2)]
        await until(lambda: server.metrics()["longspan_requests_waiting"] == 1, seconds=20)
        late = [client.generate([7 + index] * 300, max_tokens=9, timeout=0.3) for index in range(40)]
        ends = await asyncio.gather(*late, return_exceptions=True)
        assert {type(end) for end in ends} == {DeadlineError}
        whole = [(await answer).usage for answer in holding]
    own = sum(one.prompt_tokens - one.cached_prompt_tokens + one.completion_tokens - 1 for one in whole)
    assert server.metrics()[computed] - before == own


def test_a_full_queue_turns_requests_away(started):
    server = started(*FULL)
    begun = threading.Event()
    first = in_background(lambda: read_until_error(server, begun))
    assert begun.wait(20)
    with server.client() as client:
        second = client.stream("waits", **ENDLESS)
        waiting = in_background(lambda: sum(len(delta.token_ids) for delta in second))
        wait_until(lambda: client.server_info().load.waiting)
        with pytest.raises(BusyError) as caught:
            client.generate("too many", max_tokens=1)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after > 0
        assert waiting.result(60) == ENDLESS["max_tokens"]
    assert first.result(60)[0] is None
    assert server.metrics()['longspan_request_rejections_total{reason="queue_full"}'] == 1


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(started):
    server = started(*FULL)
    begun = threading.Event()

    def whole():
        with server.client() as client:
            stream = client.stream("hello", **ENDLESS)
            count = 0
            for delta in stream:
                begun.set()
                count += len(delta.token_ids)
            return count

    running = in_background(whole)
    with server.client() as client:
        assert client.health()
        assert begun.wait(20)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not client.health())
        with pytest.raises(UnavailableError):
            client.generate("too late", max_tokens=1)
    assert running.result(30) == ENDLESS["max_tokens"]
    assert server.stop() == 0


def test_draining_has_an_end(started):
    server = started(*TIGHT)
    engine = psutil.Process(server.engine_pid)
    begun = threading.Event()
    stream = in_background(lambda: read_until_error(server, begun))
    assert begun.wait(20)
    asked = time.monotonic()
    assert server.stop(signal.SIGHUP) == 0
    assert time.monotonic() - asked < 0.5 + 10
    wait_ended(engine, 20)
    stream.result(60)


def test_a_killed_engine_ends_streams_at_once_and_the_server_with_an_error(started):
    server = started(*WINDOW)
    begun = threading.Event()
    stream = in_background(lambda: read_until_error(server, begun))
    assert begun.wait(20)
    killed = time.monotonic()
    os.kill(server.engine_pid, signal.SIGKILL)
    error, when = stream.result(10)
    assert isinstance(error, UnavailableError)
    assert when - killed < 10, "at once, but for a busy machine"
    assert server.process.wait(60) == 1
    assert "signal 9" in server.log


def test_a_killed_engine_is_started_again_if_configured_and_given_up_at_the_limit(started):
    server = started("--on-engine-failure", "restart", "--restart-limit", "2")
    with server.client() as client:
        before = client.generate("hello", max_tokens=5, temperature=0)
        wait_until(lambda: len(server.engine_pids) == 2)
        first, spare = server.engine_pids
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: restarts(server, "died") == 1)
        client.wait_until_ready(timeout=120)
        assert server.engine_pid == spare, "it had been started ahead"
        wait_until(lambda: len(server.engine_pids) == 2)
        os.kill(server.engine_pids[1], signal.SIGKILL)  # as where memory runs out
        os.kill(spare, signal.SIGKILL)
        wait_until(lambda: restarts(server, "died") == 2)
        client.wait_until_ready(timeout=120)
        after = client.generate("hello", max_tokens=5, temperature=0)
        assert list(after.token_ids) == list(before.token_ids)
        os.kill(server.engine_pid, signal.SIGKILL)
        assert server.process.wait(60) == 1
    assert "the engine failed 3 times within 600 s of serving, the last time with this reason: " in server.log
