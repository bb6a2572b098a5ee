"""``longspan health --http``: what the image's health check asks."""

from __future__ import annotations

import socket

import pytest
from typer.testing import CliRunner

from loadtest.cli.application import application
from server.access.certificates import Certificates
from server.settings import Settings
from tests.api.scraping import serving
from tests.authority import Authority


def health(port: int, *arguments: str) -> tuple[int, str]:
    command = ["health", "--http", "--metrics-port", str(port), *arguments]
    done = CliRunner().invoke(application, command)
    return done.exit_code, done.stderr


@pytest.mark.parametrize("ready", [True, False])
def test_it_ends_with_what_readyz_says(ready):
    async def answer():
        return ready

    with serving(ready=answer) as port:
        code, words = health(port)
    assert (code, "up but not ready" in words) == ((0, False) if ready else (1, True))


def test_its_defaults_are_the_servers():
    fields = Settings.model_fields
    assert (fields["metrics_host"].default, fields["metrics_port"].default) == ("127.0.0.1", 9464)
    shown = CliRunner().invoke(application, ["health", "--help"]).stdout
    assert all(word in shown for word in ("LONGSPAN_METRICS_HOST", "LONGSPAN_METRICS_PORT", "9464"))


def test_by_tls_by_the_name_in_the_certificate(tmp_path):
    authority = Authority(tmp_path)
    issued = authority.issue("server.example", names="DNS:server.example")
    named = ("--metrics-tls", "--server-name", "server.example", "--ca")
    with serving(tls=Certificates(issued.certificate, issued.key, None).context) as port:
        assert health(port, *named, str(authority.root)) == (0, "")
        code, words = health(port, "--metrics-tls", "--ca", str(authority.root))
        assert code == 1
        assert "127.0.0.1" in words, "which is not its name"
        code, words = health(port, *named, str(Authority(tmp_path / "another").root))
        assert (code, "certificate verify failed" in words) == (1, True)
        code, words = health(port, *named, str(tmp_path / "none.pem"))
        assert (code, "none.pem has no roots that can be read (No such file" in words) == (1, True)
        code, words = health(port)
        assert (code, "--metrics-tls exactly where" in words) == (1, True)


def test_where_no_readyz_is():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        code, words = health(port)
        assert (code, f"no answer from 127.0.0.1:{port} (Connection refused)" in words) == (1, True)
        free.listen()  # and answers nothing
        code, words = health(port, "--timeout", "0.1")
        assert (code, "(timed out)" in words) == (1, True)
    code, words = health(port, "--wait")
    assert (code, "leave out --http" in words) == (2, True)
