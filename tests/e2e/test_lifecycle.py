"""Servers that start, are full, lose requests, drain and end: a small random model.

A process's own life is that of a real one; what it answers is asked of one in this process.
"""

import asyncio
import concurrent.futures
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
from tests.e2e.here import serving
from tests.e2e.server import Server
from tests.processes import wait_ended, wait_until

pytestmark = pytest.mark.long

# A second or more, and within the model's context.
ENDLESS = {"max_tokens": 1000, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def shared(tiny_packed):
    """One real server of the tiny model; the last test ends it."""
    with Server(*tiny_packed, "--max-running", "32") as running:
        yield running


@pytest.fixture(scope="module")
def window(tiny_settings):
    """One whose requests see 64 tokens, one at a time."""
    options = {"window": "64", "sinks": "4"}
    with serving(
        **tiny_settings,
        attention="sliding_window",
        attention_option=options,
        prefix_cache=False,
        max_running=1,
    ) as running:
        yield running


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
    await shared.cancel_many(200, random.Random(0))
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


def test_short_of_pages_streams_are_preempted_and_still_say_the_same(shared, tiny_settings):
    def ask(server):
        def one(i):
            with server.client() as client:
                answer = client.generate([10 + i] * 20, max_tokens=60, temperature=0, ignore_eos=True)
                return list(answer.token_ids)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(one, range(16)))

    # 2 layers of 2 key and value heads of 16 numbers, 2 bytes each: a page of 4 tokens takes 1 KiB.
    tight = {"page_size": 4, "kv_memory": "150KiB", "max_context": 512}
    with serving(**tiny_settings, **tight, prefix_cache=False) as server:
        assert ask(server) == ask(shared)
        assert server.metrics()["longspan_preemptions_total"] > 0
        server.wait_idle()


def test_a_window_is_served_as_configured_and_keeps_few_pages(window):
    with window.client() as client:
        attention = client.model_info().attention
        assert (attention.backend, attention.pattern) == ("sliding_window", "sliding_window")
        assert dict(attention.options) == {
            **{"window": "64", "sinks": "4", "positions": "original"},
            "dense_layers": "",
        }
        stream = client.stream("hello", **{**ENDLESS, "max_tokens": 3 * 64})
        used = [client.server_info().load.pages_used for _ in stream]
    assert max(used) <= 1 + 64 // 16 + 2
    assert 'attention_backend="sliding_window"' in "".join(window.metrics())
    window.wait_idle()


async def test_what_expires_in_the_queue_is_never_computed(window):
    computed = "longspan_engine_step_batch_tokens_sum"
    before = window.metrics()[computed]
    async with window.aclient() as client:
        holding = []
        for tokens, gauge in ((600, "longspan_requests_running"), (5, "longspan_requests_waiting")):
            asked = client.generate([5] * 9, **{**ENDLESS, "max_tokens": tokens})
            holding.append(asyncio.create_task(asked))
            await until(lambda gauge=gauge: window.metrics()[gauge] == 1, seconds=20)
        late = [client.generate([7 + index] * 300, max_tokens=9, timeout=0.1) for index in range(40)]
        ends = await asyncio.gather(*late, return_exceptions=True)
        assert {type(end) for end in ends} == {DeadlineError}
        whole = [(await answer).usage for answer in holding]
    own = sum(one.prompt_tokens - one.cached_prompt_tokens + one.completion_tokens - 1 for one in whole)
    assert window.metrics()[computed] - before == own


def test_a_full_queue_turns_requests_away(tiny_settings):
    with serving(**tiny_settings, max_running=1, max_queue=1) as server, server.client() as client:
        begun = threading.Event()
        first = in_background(lambda: read_until_error(server, begun))
        assert begun.wait(20)
        second = client.stream("waits", max_tokens=5, ignore_eos=True)
        waiting = in_background(lambda: sum(len(delta.token_ids) for delta in second))
        wait_until(lambda: client.server_info().load.waiting)
        with pytest.raises(BusyError) as caught:
            client.generate("too many", max_tokens=1)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after > 0
        assert waiting.result(60) == 5
        assert first.result(60)[0] is None
        assert server.metrics()['longspan_request_rejections_total{reason="queue_full"}'] == 1


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(shared):
    engine = psutil.Process(shared.engine_pid)
    begun = threading.Event()

    def whole():
        with shared.client() as client:
            stream = client.stream("hello", **ENDLESS)
            count = 0
            for delta in stream:
                begun.set()
                count += len(delta.token_ids)
            return count

    running = in_background(whole)
    with shared.client() as client:
        assert client.health()
        assert begun.wait(20)
        shared.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not client.health())
        with pytest.raises(UnavailableError):
            client.generate("too late", max_tokens=1)
    assert running.result(30) == ENDLESS["max_tokens"]
    assert shared.stop() == 0
    wait_ended(engine, 20)
