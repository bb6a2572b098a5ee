"""``/metrics``: its connections, by TLS, and for those who show a token."""

from __future__ import annotations

import gzip
import http.client
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from loadtest.load.reconcile import ScrapeError, scrape
from server.access.callers import Callers
from server.access.certificates import Certificates
from server.access.identities import token_hash
from server.observe import http_server
from server.observe.http_server import MOST_CONNECTIONS
from server.observe.metrics import Metrics
from server.observe.metrics_server import listen
from tests.api.conftest import always
from tests.api.scraping import serving
from tests.authority import Authority


def read(port: int, scheme: str = "http", token: str = "", root: Path | None = None) -> str:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{scheme}://localhost:{port}/metrics", headers=headers)
    context = ssl.create_default_context(cafile=root) if root is not None else None
    with urllib.request.urlopen(request, timeout=5, context=context) as response:
        return response.read().decode()


def test_only_a_token_that_may_read_is_answered(tmp_path):
    file = tmp_path / "identities.toml"
    file.write_text(
        f"[prometheus]\ntoken_sha256 = ['{token_hash('its')}']\nmetrics = true\n"
        f"[alice]\ntoken_sha256 = ['{token_hash('hers')}']\n"
    )
    with serving(authorize=Callers(file).may_read_metrics) as port:
        assert "longspan_" in read(port, token="its")
        for method, path in (("HEAD", "/metrics"), ("POST", "/metrics"), ("GET", "/")):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request(method, path)
            assert connection.getresponse().status == 401, "a stranger learns nothing else"
            connection.close()
        with pytest.raises(urllib.error.HTTPError) as caught:
            read(port, token="hers")
        assert caught.value.code == 403
        assert "metrics = true" in caught.value.read().decode()
        for wrong in ("", "other"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                read(port, token=wrong)
            assert caught.value.code == 401
            assert "Basic" in caught.value.headers["WWW-Authenticate"]
            assert "longspan_" not in caught.value.read().decode()


def test_by_tls_with_a_certificate_that_is_read_again(tmp_path):
    first, other = Authority(tmp_path / "first"), Authority(tmp_path / "other")
    files = [Path(shutil.copy(file, tmp_path)) for file in first.issue("localhost")]
    certificates = Certificates(*files, None)
    with serving(tls=certificates.context) as port:
        with ExitStack() as silent:  # before their handshakes
            for _ in range(2 * MOST_CONNECTIONS):
                silent.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert "longspan_" in read(port, "https", root=first.root)
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            read(port, "https", root=other.root)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            read(port)
        shutil.copy(other.issue("localhost").certificate, files[0])
        certificates.look()
        assert "longspan_" in read(port, "https", root=first.root), "its key is not there yet"
        shutil.copy(other.issue("localhost").key, files[1])
        shutil.copy(tmp_path / "other" / "localhost.pem", files[0])
        certificates.look()
        assert "longspan_" in read(port, "https", root=other.root)


def test_a_certificate_that_fails_in_an_unforeseen_way_ends_one_connection_only(tmp_path):
    authority = Authority(tmp_path)
    certificates = Certificates(*authority.issue("localhost"), None)
    failures = [ValueError("unforeseen")]

    def context():
        if failures:
            raise failures.pop()
        return certificates.context()

    with serving(tls=context) as port:
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            read(port, "https", root=authority.root)
        assert "longspan_" in read(port, "https", root=authority.root)


def test_a_load_reads_them_by_tls_with_its_token(tmp_path, monkeypatch):
    file, authority = tmp_path / "identities.toml", Authority(tmp_path / "authority")
    file.write_text(f"[loader]\ntoken_sha256 = ['{token_hash('its')}']\nmetrics = true\n")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    authorize, ca = Callers(file).may_read_metrics, {"ca": authority.root}
    with serving(authorize=authorize, tls=Certificates(*authority.issue("localhost"), None).context) as port:
        url = f"https://localhost:{port}/metrics"
        assert scrape(url, {**ca, "token": "its"})
        for connect, sentence in ((ca, "401"), ({"token": "its"}, "CERTIFICATE_VERIFY_FAILED")):
            with pytest.raises(ScrapeError, match=sentence):
                scrape(url, connect)
    with serving(authorize=authorize) as port:
        assert scrape(f"http://127.0.0.1:{port}/metrics", {"token": "its"})


def connect(port: int, host: str = "127.0.0.1", seconds: float = 5) -> socket.socket:
    return socket.create_connection((host, port), timeout=seconds)


def ended(connection: socket.socket) -> bool:
    """Whether the server has closed it, after whatever it had still to say."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"])
def test_idle_connections_take_no_threads_and_keep_no_scraper_out(said):
    with serving() as port, ExitStack() as idle:
        threads = threading.active_count()
        kept = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        begun = time.monotonic()
        for count in range(240):
            idle.enter_context(connect(port)).sendall(said)
            if count % 20 == 0:  # so that the one kept is never the one that has waited longest
                assert "longspan_" in read(port), "a new one"
                kept.request("GET", "/metrics")
                assert b"longspan_" in kept.getresponse().read()
        assert "longspan_" in read(port)
        assert time.monotonic() - begun < 60, "a scraper that is kept out waits for ever"
        assert threading.active_count() == threads
        kept.close()


def test_one_connection_more_ends_the_one_that_has_waited_longest():
    with serving() as port, ExitStack() as stack:
        opened = [stack.enter_context(connect(port)) for _ in range(MOST_CONNECTIONS)]
        stack.enter_context(connect(port))
        assert ended(opened[0])
        opened[1].settimeout(0.2)
        assert not ended(opened[1])


def test_what_takes_too_long_is_ended(monkeypatch):
    """Each bound by itself: the other is far beyond what this test waits for."""
    monkeypatch.setattr(http_server, "_IDLE_SECONDS", 600.0)
    monkeypatch.setattr(http_server, "_REQUEST_SECONDS", 0.2)
    with serving() as port, connect(port, seconds=60) as slow, connect(port, seconds=0.5) as silent:
        slow.sendall(b"GET /metr")
        assert ended(slow)
        assert not ended(silent)
    monkeypatch.setattr(http_server, "_IDLE_SECONDS", 0.3)
    monkeypatch.setattr(http_server, "_REQUEST_SECONDS", 600.0)
    with serving() as port, connect(port, seconds=60) as silent, connect(port, seconds=60) as again:
        begun = time.monotonic()
        again.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert ended(silent)
        assert ended(again), "it had its answer, and then asked for nothing"
        assert time.monotonic() - begun > 0.2


def test_an_answer_that_is_not_taken_is_given_up(monkeypatch):
    monkeypatch.setattr(http_server, "_REQUEST_SECONDS", 0.2)
    registry = CollectorRegistry()
    large = Counter("large", "x", ["label"], registry=registry)
    for index in range(100):
        large.labels(f"{index}" * 50_000)
    server, port = listen(registry, "127.0.0.1", 0, always)
    with connect(port) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        received = 0
        while got := connection.recv(1 << 20):
            received += len(got)
        assert 0 < received < 9_000_000
    server.close()


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\xff\xfe\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\n", 405),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnone", 405),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnone", 413),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 413),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000, 431),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 4000, 431),
    ],
)
def test_what_is_no_scrape_gets_a_status_and_a_sentence(said, status):
    with serving() as port, connect(port) as connection:
        connection.sendall(said)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == status
        assert len(response.read().splitlines()) == 1
        assert "longspan_" in read(port)


def test_head_is_get_without_the_body(caplog):
    with serving() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        lengths = []
        for method, path in (("GET", "/metrics"), ("HEAD", "/metrics"), ("GET", "/"), ("HEAD", "/")):
            connection.request(method, path)  # by the same connection
            response = connection.getresponse()
            lengths.append((response.status, int(response.getheader("Content-Length"))))
            assert bool(response.read()) == (method == "GET")
        connection.close()
        assert lengths[0] == lengths[1]
        assert lengths[2] == lengths[3]
        assert [status for status, _ in lengths[::2]] == [200, 404]
        with connect(port) as bodied:
            bodied.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
            assert bodied.recv(1 << 16).startswith(b"HTTP/1.1 413")
    assert not caplog.records


def test_a_connection_is_kept_and_content_is_negotiated():
    with serving() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        kinds = []
        for accept in ("text/plain", "application/openmetrics-text; version=1.0.0"):
            connection.request("GET", "/metrics", headers={"Accept": accept, "Accept-Encoding": "gzip"})
            response = connection.getresponse()
            assert b"longspan_" in gzip.decompress(response.read())
            kinds.append(response.getheader("Content-Type").partition(";")[0])
        assert kinds == ["text/plain", "application/openmetrics-text"]
        connection.request("GET", "/metrics?name[]=longspan_engine_restarts_total")
        assert connection.getresponse().read().count(b"# TYPE") == 1
        with connect(port) as two:
            two.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics HTTP/1.0\r\n\r\n")
            answers = b""
            while got := two.recv(1 << 16):
                answers += got
        assert answers.count(b"HTTP/1.1 200") == 2


def test_by_ipv6():
    server, port = listen(Metrics().registry, "::1", 0, always)
    with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=5) as response:
        assert response.status == 200
    server.close()
