"""``/metrics`` by TLS, and for those who show a token."""

from __future__ import annotations

import shutil
import socket
import ssl
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from loadtest.load.reconcile import ScrapeError, scrape
from server.access.callers import Callers
from server.access.certificates import Certificates
from server.access.identities import token_hash
from server.observe.metrics import Metrics
from server.observe.metrics_server import listen
from tests.authority import Authority


@contextmanager
def serving(**options):
    metrics = Metrics()
    metrics.restarted("died")
    server, port = listen(metrics.registry, "127.0.0.1", 0, **options)
    yield port
    server.shutdown()
    server.server_close()


def read(port: int, scheme: str = "http", token: str = "", root: Path | None = None) -> str:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{scheme}://localhost:{port}/metrics", headers=headers)
    context = ssl.create_default_context(cafile=root) if root is not None else None
    with urllib.request.urlopen(request, timeout=5, context=context) as response:
        return response.read().decode()


def test_only_a_token_that_may_read_is_answered(tmp_path):
    file = tmp_path / "identities.toml"
    file.write_text(f"[prometheus]\ntoken_sha256 = ['{token_hash('its')}']\nmetrics = true\n")
    with serving(authorize=Callers(file).may_read_metrics) as port:
        assert "longspan_" in read(port, token="its")
        for wrong in ("", "other"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                read(port, token=wrong)
            assert caught.value.code == 401
            assert "Basic" in caught.value.headers["WWW-Authenticate"]
            assert "longspan_" not in caught.value.read().decode()


def test_by_tls_with_a_certificate_that_is_read_again(tmp_path):
    first, other = Authority(tmp_path / "first"), Authority(tmp_path / "other")
    files = [Path(shutil.copy(file, tmp_path)) for file in first.issue("localhost")]
    with serving(tls=Certificates(*files, None).context) as port:
        # One that says nothing holds up its own thread, and no other.
        with socket.create_connection(("127.0.0.1", port)):
            assert "longspan_" in read(port, "https", root=first.root)
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            read(port, "https", root=other.root)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            read(port)
        shutil.copy(other.issue("localhost").certificate, files[0])
        assert "longspan_" in read(port, "https", root=first.root), "its key is not there yet"
        shutil.copy(other.issue("localhost").key, files[1])
        shutil.copy(tmp_path / "other" / "localhost.pem", files[0])
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
