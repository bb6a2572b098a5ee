"""Commands that talk to a server reach it by TLS, with what they are told to show."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import grpc
import pytest
import typer

from loadtest.cli.application import application
from server.cli.connection import NAMES, VARIABLES
from tests.authority import Authority
from tests.command import longspan
from tests.scripted import Running, serving


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def secure(authority: Authority) -> Iterator[Running]:
    issued = authority.issue("served")
    pair = issued.key.read_bytes(), issued.certificate.read_bytes()
    with serving(credentials=grpc.ssl_server_credentials([pair])) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_every_command_of_a_server_has_the_same_options() -> None:
    commands = typer.main.get_command(application).commands  # type: ignore[attr-defined]
    for name in ("generate", "health", "load"):
        parameters = [parameter.name for parameter in commands[name].params]
        assert [each for each in parameters if each in NAMES] == list(NAMES)
        assert "connection" not in parameters


def test_they_are_the_clients() -> None:
    from longspan import Client, ConnectOptions

    fields = {*ConnectOptions.__annotations__, *inspect.signature(Client.__init__).parameters}
    assert set(NAMES) <= fields


def test_flags_and_variables(secure: Running, authority: Authority) -> None:
    place = ("--port", str(secure.port))
    flags = ("--tls", "--ca", str(authority.root), "--token", "mine")
    variables = {"LONGSPAN_CA": str(authority.root), "LONGSPAN_TOKEN": "mine"}
    for given, environment in ((flags, {}), ((), variables)):
        done = longspan("generate", "abc", *place, *given, environment=environment)
        assert (done.returncode, done.stdout) == (0, "cba"), done.stderr
        assert secure.service.metadata.pop("authorization") == "Bearer mine"
    assert longspan("health", *place, environment=variables).returncode == 0
    done = longspan("health", *place)
    assert done.returncode == 1
    assert "it may want TLS" in done.stderr


@pytest.mark.parametrize("command", [("generate", "x"), ("health",), ("load",)])
def test_mistakes_are_sentences(command: tuple[str, ...]) -> None:
    for arguments, sentence in (
        (("--token", "secret", "--host", "example.invalid"), "connect by TLS (tls=True, --tls)"),
        (("--ca", __file__), "has no certificates in PEM"),
        (("--cert", "c.pem"), "give both (--cert, --key)"),
        (("--host", "localhost:50051"), "host localhost and port 50051 (--host, --port)"),
    ):
        done = longspan(*command, *arguments)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "secret" not in done.stderr
        assert "Traceback" not in done.stderr
