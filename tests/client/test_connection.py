"""How clients connect: addresses, TLS, what they show, and which calls they repeat."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from longspan import AsyncClient, Client, LongspanError, UnauthenticatedError, UnavailableError
from longspan.channel import target
from longspan.errors import from_rpc_error
from tests.authority import Authority, Issued
from tests.scripted import Running, serving


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def own(authority: Authority) -> Issued:
    """A client's certificate."""
    return authority.issue("client")


@pytest.fixture
def mutual(authority: Authority) -> Iterator[Running]:
    """A server by the name of longspan.example that wants certificates."""
    issued = authority.issue("served", "DNS:longspan.example")
    pair = issued.key.read_bytes(), issued.certificate.read_bytes()
    credentials = grpc.ssl_server_credentials([pair], authority.root.read_bytes(), True)
    with serving(credentials=credentials) as running:
        yield running


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("h", "h:5"),
        ("::1", "[::1]:5"),
        ("dns:///h", "dns:///h:5"),
        ("dns:///h:6", "dns:///h:6"),
        ("dns://8.8.8.8/h", "dns://8.8.8.8/h:5"),
        ("unix:/run/x", "unix:/run/x"),
        ("ipv4:10.0.0.1:6,10.0.0.2:6", "ipv4:10.0.0.1:6,10.0.0.2:6"),
    ],
)
def test_targets(host: str, expected: str) -> None:
    assert target(host, 5) == expected


def test_a_target_of_grpcs_own_form(server: Running) -> None:
    with Client("dns:///localhost", server.port) as client:
        assert client.generate("abc").text == "cba"


async def test_by_mutual_tls_with_a_token(mutual: Running, authority: Authority, own: Issued) -> None:
    options = {"ca": authority.root, "cert": own.certificate, "key": str(own.key), "token": "mine"}
    with Client(port=mutual.port, server_name="longspan.example", **options) as client:
        assert client.health()
        assert client.generate("abc").text == "cba"
        assert mutual.service.metadata["authorization"] == "Bearer mine"
        assert [delta.text for delta in client.stream("ab")] == ["b", "a"]
        assert mutual.service.metadata["authorization"] == "Bearer mine"
    async with AsyncClient(port=mutual.port, server_name="longspan.example", **options) as aclient:
        assert (await aclient.generate("abc")).text == "cba"
        assert mutual.service.metadata["authorization"] == "Bearer mine"
        mutual.service.metadata.clear()
        assert [delta.text async for delta in aclient.stream("ab")] == ["b", "a"]
        assert mutual.service.metadata["authorization"] == "Bearer mine"


def test_what_is_wrong_with_a_connection_is_told(
    mutual: Running, server: Running, authority: Authority, own: Issued, tmp_path: Path
) -> None:
    shown = {"cert": own.certificate, "key": own.key}
    other = Authority(tmp_path / "other").root
    for port, options, sentence in (
        (server.port, {"tls": True}, "it does not speak TLS"),
        (
            mutual.port,
            {"ca": other, "server_name": "longspan.example", **shown},
            "of the roots that are trust",
        ),
        (mutual.port, {"ca": authority.root, **shown}, "its certificate has another name"),
    ):
        with Client(port=port, **options) as client, pytest.raises(UnavailableError, match=sentence):
            client.models(timeout=10)


@pytest.mark.parametrize("cause", ["", "ipv4:127.0.0.1:1: Socket closed"])
def test_a_server_that_hangs_up_may_want_tls(cause: str) -> None:
    class Call(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return f"failed to connect to all addresses; last error: UNAVAILABLE: {cause}"

        def trailing_metadata(self) -> tuple[()]:
            return ()

    assert ("it may want TLS" in str(from_rpc_error(Call(), "h:1"))) == bool(cause)


@pytest.mark.parametrize(
    ("host", "options", "sentence"),
    [
        ("h", {"token": "x"}, "the token could be read on the way to h:50051"),
        ("dns:///h", {"token": "x"}, "could be read"),
        ("dns://10.0.0.1/localhost", {"token": "x"}, "could be read"),
        ("unixbox.example.com", {"token": "x"}, "could be read"),
        ("vsock1.example.com", {"token": "x"}, "could be read"),
        ("vsock:2:5", {"token": "x"}, "could be read"),
        ("xds:///localhost", {"token": "x"}, "could be read"),
        ("ipv4:127.0.0.1:5,10.0.0.1:5", {"token": "x"}, "could be read"),
        ("other/localhost", {"token": "x"}, "could be read"),
        ("h", {"metadata": [("authorization", "Bearer x")]}, "could be read"),
        ("h", {"cert": "c"}, "cert and key belong together"),
        ("h", {"ca": "/nowhere/ca.pem"}, "/nowhere/ca.pem can't be read"),
        ("h", {"ca": __file__}, "has no certificates in PEM"),
        ("h", {"cert": __file__, "key": __file__}, "are not a certificate and its unencrypted key"),
        ("localhost:50051", {}, "give them apart: host localhost and port 50051"),
        ("[::1]", {}, "is not the address of a host; give a name or an address"),
        ("http://127.0.0.1:5", {}, "give them apart: host 127.0.0.1 and port 5 "),
        ("grpc://h/", {}, "give the name alone: host h "),
        ("h", {"timeout": 0}, "timeout is 0; it must be above 0 seconds"),
        ("h", {"timeout": float("nan")}, "timeout is nan"),
        ("127.0.0.1", {"token": "a\nb"}, "the token is not one: these have printable ASCII"),
        ("127.0.0.1", {"token": "\u00e9"}, "the token is not one"),
        ("127.0.0.1", {"token": " \n"}, "the token is not one"),
        ("127.0.0.1", {"metadata": [("x", "a\nb")]}, "metadata 'x': a value has printable ASCII"),
        ("127.0.0.1", {"metadata": [("x", b"\xff")]}, "metadata 'x': a value"),
        ("127.0.0.1", {"metadata": [("X", "a")]}, "metadata 'X': a name has lower-case"),
    ],
)
def test_options_that_cannot_work_are_refused(host: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Client(host, **options)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "::1", "dns:///localhost", "dns:localhost", "ipv4:127.0.0.1:5"),
        *("ipv6:[::1]:5", "unix:/run/x", "unix-abstract:x"),
    ],
)
def test_on_this_machine_a_token_needs_no_tls(host: str) -> None:
    Client(host, token="x").close()


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with Client(port=server.port, token="t", timeout=10) as client:
            assert client.generate("abc").text == "cba"
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


async def test_a_call_without_any_time_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="timeout is 0"):
        client.stream("a", timeout=0)
    client.timeout = -1
    with pytest.raises(ValueError, match="timeout is -1"):
        client.health()
    with pytest.raises(ValueError, match="timeout is 0"):
        AsyncClient(timeout=0)


def test_an_option_that_there_is_not_gets_all_that_there_are() -> None:
    with pytest.raises(TypeError, match="no option api_key; the options are timeout, channel, tls, ca, cert"):
        Client(api_key="x")


def test_the_end_of_a_tokens_line_is_no_part_of_it(server: Running) -> None:
    with Client(port=server.port, token=" mine\r\n") as client:
        client.generate("abc")
    assert server.service.metadata["authorization"] == "Bearer mine"


def test_a_port_that_speaks_http_only_is_told_from_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor() as pool:

        def answer() -> None:
            for _ in range(4):
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")

        pool.submit(answer)
        port = listening.getsockname()[1]
        with (
            Client(port=port, timeout=20) as client,
            pytest.raises(UnavailableError, match="does not speak gRPC; the port may be that of /metrics"),
        ):
            client.health()
        listening.shutdown(socket.SHUT_RDWR)


def test_metadata(client: Client, server: Running) -> None:
    metadata = [("traceparent", "00-1-2-01"), ("x-bin", b"\0")]
    with Client(port=server.port, metadata=metadata, token="t") as named:
        named.generate("abc")
    shown = server.service.metadata
    assert (shown["traceparent"], shown["x-bin"], shown["authorization"]) == ("00-1-2-01", b"\0", "Bearer t")


async def test_a_channel_of_ones_own_stays_open(server: Running) -> None:
    address = f"127.0.0.1:{server.port}"
    with grpc.insecure_channel(address) as channel:
        for _ in range(2):
            with Client(channel=channel, token="t") as client:
                assert client.generate("abc").text == "cba"
        assert server.service.metadata["authorization"] == "Bearer t"
        with pytest.raises(ValueError, match="a channel of your own has its own ca, tls"):
            Client(channel=channel, tls=True, ca="x")
    async with grpc.aio.insecure_channel(address) as achannel:
        for _ in range(2):
            async with AsyncClient(channel=achannel) as aclient:
                assert (await aclient.generate("abc")).text == "cba"


def test_a_call_that_could_not_begin_is_repeated(client: Client, server: Running) -> None:
    assert client.generate("!twice unavailable").text == "elbaliavanu eciwt!"
    assert len(server.service.requests) == 3
    server.service.requests.clear()
    assert "".join(delta.text for delta in client.stream("!twice unavailable")) == "elbaliavanu eciwt!"
    assert len(server.service.requests) == 3


def test_four_times_at_most_within_about_a_second(client: Client, server: Running) -> None:
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="loading its model"):
        client.generate("!unavailable")
    assert len(server.service.requests) == 4
    # 0.1 + 0.2 + 0.4 s, each 20% more at most, and room for a busy machine.
    assert time.monotonic() - begun < 20


def test_no_answer_begins_twice(client: Client, server: Running) -> None:
    with pytest.raises(UnavailableError):
        list(client.stream("!unavailable later"))
    assert len(server.service.requests) == 1


def test_repeats_can_be_left_out(server: Running) -> None:
    with Client(port=server.port, retries=False) as client, pytest.raises(UnavailableError):
        client.generate("!twice unavailable")
    assert len(server.service.requests) == 1


@pytest.mark.parametrize(
    "code",
    [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED],
)
def test_errors_of_access_have_classes(code: grpc.StatusCode) -> None:
    from longspan.errors import _BY_STATUS

    assert issubclass(_BY_STATUS[code], LongspanError)
    assert UnauthenticatedError.status is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_misspelt_option_is_no_plain_text(kind):
    with pytest.raises(TypeError, match="there is no option tsl; the options are timeout, channel, tls, ca"):
        kind("127.0.0.1", tsl=True)
