"""Whatever connections do, other clients' streams go on, health answers, and so does ``/metrics``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e import hostile, http2
from tests.e2e.abuse import ABUSES
from tests.e2e.server import Server
from tests.packaging.test_dockerfile import command_line
from tests.processes import wait_until

pytestmark = pytest.mark.long

# As in test_hostile: other tests run beside these.
MOST_SECONDS = 2.0
MOST_GROWN = 300 << 20


@pytest.fixture(scope="module")
def server(tiny_packed):
    """It may open 300 files, and so takes 44 connections."""
    with Server(*tiny_packed, "--on-engine-failure", "restart", files=300) as running:
        yield running


def abuse(server: Server, *names: str, much: int, times: int = 1) -> None:
    """Does these on connections of their own and checks what others see meanwhile."""
    address = (server.host, server.port)
    with hostile.watched(server, rest=0.1) as seen:
        for name in names * times:
            http2.send(address, *ABUSES[name](much), seconds=0.1)
    assert seen.held < MOST_SECONDS
    assert seen.grown < MOST_GROWN
    with server.client() as client:
        assert client.generate("hello", max_tokens=2).completions
    assert "Traceback" not in server.log


def test_abuse_of_http2_stops_nothing(server):
    abuse(server, *ABUSES, much=100)
    server.wait_idle()


@pytest.mark.stress
@pytest.mark.parametrize("name", ABUSES)
def test_much_abuse_of_http2_stops_nothing(server, name):
    abuse(server, name, much=5000, times=5)
    server.wait_idle(20)


def open_many(address: tuple[str, int], count: int, said: bytes, into: ExitStack) -> None:
    for _ in range(count):
        into.enter_context(socket.create_connection(address, timeout=5)).sendall(said)


def test_with_all_connections_taken_the_established_ones_metrics_and_the_engine_go_on(server):
    with ExitStack() as stack:
        assert "takes 44 connections at most instead of 4096 (--max-connections)" in server.log
        health = stack.enter_context(grpc.insecure_channel(f"{server.host}:{server.port}"))
        client = stack.enter_context(server.client())
        stub = health_pb2_grpc.HealthStub(health)

        def answers() -> None:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert client.health()
            assert server.metrics()
            assert server.probe("/readyz") == 200

        def image_says() -> int:
            command = [sys.executable, "-m", "server.cli", *command_line("HEALTHCHECK")[1:]]
            environment = {**os.environ, "LONGSPAN_METRICS_PORT": str(server.metrics_port)}
            return subprocess.run(command, env=environment, timeout=60, check=False).returncode

        answers()
        with ExitStack() as strangers:
            open_many((server.host, server.port), 300, http2.BEGIN, strangers)
            open_many((server.host, server.metrics_port), 240, b"", strangers)
            answers()
            assert client.generate("hello", max_tokens=2).completions
            with socket.create_connection((server.host, server.port), timeout=5) as late:
                assert late.recv(100) == b"", "it is closed at once"
            assert image_says() == 0
            os.kill(server.engine_pid, signal.SIGKILL)
            wait_until(lambda: server.probe("/readyz") == 503)
            assert server.probe("/healthz") == 200
            client.wait_until_ready(timeout=60)
            answers()
            assert psutil.Process(server.process.pid).num_fds() < 200
        time.sleep(0.2)
        with socket.create_connection((server.host, server.port), timeout=5) as late:
            assert late.recv(100)
        assert "Traceback" not in server.log


def test_connections_that_come_for_one_call_each_leave_nothing(server):
    """As gRPC's own interoperability tests have it: a channel for each call, and none fails."""
    process = psutil.Process(server.process.pid)
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    before = process.num_fds()
    for _ in range(60):
        with grpc.insecure_channel(f"{server.host}:{server.port}", own_connection) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    wait_until(lambda: process.num_fds() <= before + 2)


def test_where_descriptors_run_out_what_is_established_goes_on(server):
    """As where another part of the process took them: gRPC tries again each second, the metrics sooner."""
    process = psutil.Process(server.process.pid)
    limits = process.rlimit(psutil.RLIMIT_NOFILE)
    with server.client() as client, ExitStack() as strangers:
        assert client.health()
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 20, limits[1]))
        try:
            open_many((server.host, server.port), 100, http2.BEGIN, strangers)
            time.sleep(0.2)
            busy = sum(process.cpu_times()[:2])
            for _ in range(10):
                assert client.health()
                time.sleep(0.1)
            assert client.generate("hello", max_tokens=2).completions
            assert sum(process.cpu_times()[:2]) - busy < 0.5, "it waits, and does not spin"
        finally:
            process.rlimit(psutil.RLIMIT_NOFILE, limits)
    with server.client() as client:
        client.wait_until_ready(timeout=10)
    assert server.metrics()
