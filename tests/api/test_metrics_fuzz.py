"""Mutated requests for ``/metrics``: each is answered or ended, and none is an error of the server's."""

from __future__ import annotations

import logging
import random
import socket

import pytest

from server.access.callers import Callers
from server.access.identities import token_hash
from tests.api.test_metrics_server import connect, ended, serving

PIECES = (
    *(
        b"GET ",
        b"HEAD ",
        b"POST ",
        b"CONNECT ",
        b"OPTIONS ",
        b"/metrics",
        b"/",
        b"*",
        b"?name[]=%ff&&=;",
        b" ",
    ),
    *(
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b"Host: x\r\n",
        b"Content-Length: 0\r\n",
    ),
    *(
        b"Content-Length: 3\r\n",
        b"Content-Length: -1\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"5\r\nabcde\r\n0",
    ),
    *(b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n"),
    *(b"Accept: \xff;;q=x,\r\n", b"Accept-Encoding: gzip;q=\r\n", b"Authorization: Basic \xff=\r\n"),
    *(b"Authorization: Bearer its\r\n", b"\x00", b"\xff"),
)


def mutated(seed: int) -> bytes:
    """One to three requests, some of their parts replaced, doubled or missing."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    for _ in range(rng.randint(1, 3)):
        parts += [rng.choice(PIECES[:4]), b"/metrics", b" ", b"HTTP/1.1", b"\r\n", b"Host: x\r\n"]
        parts += [*rng.sample(PIECES[17:-2], rng.randint(0, 2)), b"\r\n"]
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(parts))
        parts[at : at + rng.randint(0, 1)] = rng.choice([[], [rng.choice(PIECES)], [parts[at]] * 2])
    return b"".join(parts)


@pytest.mark.parametrize("protected", [False, True])
def test_mutated_requests_are_no_news(protected, caplog, tmp_path):
    file = tmp_path / "identities.toml"
    file.write_text(f"[prometheus]\ntoken_sha256 = ['{token_hash('its')}']\nmetrics = true\n")
    answers = []
    with serving(authorize=Callers(file).may_read_metrics if protected else None) as port:
        for seed in range(400):
            with connect(port) as connection:
                try:
                    connection.sendall(mutated(seed))
                    connection.shutdown(socket.SHUT_WR)
                    answers.append(connection.recv(12)[9:])
                    assert ended(connection), f"mutation {seed}"
                except ConnectionError:  # it had bytes left to read
                    pass
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert {b"200", b"400", b"405", b"413"} <= set(answers)
    assert (b"401" in answers) == protected
