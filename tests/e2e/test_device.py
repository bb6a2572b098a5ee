"""A real server measures its device at start and counts its steps' work; a load test makes shares of it."""

import os
import time

import psutil
import pytest
from rich.console import Console

from loadtest.load.measure import measure
from loadtest.load.plan import Plan
from loadtest.load.types import ClosedLoop
from loadtest.load.workloads import Shape, fixed

BYTES, FLOPS = "longspan_engine_bytes_total", "longspan_engine_flops_total"


def test_a_load_test_tells_its_runs_use_of_the_device(server):
    with server.client() as client:
        model = client.model_info()
    prompt, output, sessions = 64, 16, 4
    plan = Plan(
        host=server.host,
        port=server.port,
        metrics_url=f"http://{server.host}:{server.metrics_port}/metrics",
        workload={"name": "fixed"},
        draw=lambda count, seed: fixed(Shape(count, prompt, output, model.vocabulary_size, 4096, seed)),
        loads=[ClosedLoop(2)],
        sessions=sessions,
        warmup=1,
    )
    with open(os.devnull, "w") as nowhere:
        (run,) = measure(plan, Console(file=nowhere)).runs
    use = run.device
    assert use is not None
    assert use.name == "cpu"
    # On a machine at its limits the server may have measured less than it reached later.
    assert use.bandwidth > 0
    assert use.matrix_rate > 0
    for share, worked, best in (
        (use.bandwidth_share, use.bytes_moved, use.bandwidth),
        (use.matrix_share, use.flops, use.matrix_rate),
    ):
        reached = worked / use.step_seconds / best
        assert share == pytest.approx(reached) if reached <= 1 else use.unmeasured
    # Each token computed passes all weights of the decoder, two operations each.
    tokens = sessions * (prompt + output - 1)
    body = 30 * (576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536)
    head = 576 * model.vocabulary_size
    weights = 2 * (tokens * body + sessions * output * head)
    assert weights < use.flops < 1.1 * weights
    # Two users share a forward where their steps fall together; prompts may be one step or two.
    forward = body * 20 // 32 + head * 34 // 32
    assert sessions * output / 2 <= use.bytes_moved / forward <= 1.2 * sessions * (output + 1)
    assert use.memory_used <= psutil.virtual_memory().total == use.memory_total


def test_metrics_of_an_idle_server_stay(server):
    server.wait_idle()
    before = server.metrics()
    time.sleep(0.1)
    after = server.metrics()
    for name in (BYTES, FLOPS, "longspan_device_memory_bandwidth_bytes_per_second"):
        assert before[name] == after[name]
    used = after['longspan_device_memory_bytes{kind="used"}']
    # The process's memory may have changed since its last step.
    assert used == pytest.approx(psutil.Process(server.engine_pid).memory_info().rss, rel=0.5)
    weights = after['longspan_device_memory_bytes{kind="weights"}']
    assert 96e6 < weights < used
    assert after['longspan_device_memory_bytes{kind="kv"}'] > 0
