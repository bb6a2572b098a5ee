"""``/healthz`` and ``/readyz``, on the address of ``/metrics``."""

from __future__ import annotations

import asyncio

import pytest

from server.access.callers import Callers
from server.access.identities import token_hash
from server.background import for_other_loops
from server.observe import metrics_server
from tests.api.scraping import get, serving


@pytest.mark.parametrize("ready", [True, False])
def test_probes_need_no_token_and_tell_what_the_loop_of_grpc_says(ready, tmp_path):
    async def answer():
        return ready

    file = tmp_path / "identities.toml"
    file.write_text(f"[alice]\ntoken_sha256 = ['{token_hash('hers')}']\n")
    with serving(ready=answer, authorize=Callers(file).may_read_metrics) as port:
        words = b"ready\n" if ready else b"alive, not ready\n"
        assert get(port, "/healthz") == get(port, "/healthz?verbose") == (200, words)
        assert get(port, "/readyz") == ((200, b"ready\n") if ready else (503, b"not ready\n"))
        assert get(port, "/readyz", "HEAD") == (200 if ready else 503, b"")
        assert get(port, "/healthz", "POST")[0] == 405
        for path in ("/metrics", "/healthz/", "/health"):
            assert get(port, path)[0] == 401


async def test_a_loop_of_grpc_that_does_not_answer_is_not_alive(monkeypatch):
    monkeypatch.setattr(metrics_server, "_LOOP_SECONDS", 0.3)
    with serving(ready=for_other_loops(lambda: True)) as port:
        assert await asyncio.to_thread(get, port, "/healthz") == (200, b"ready\n")
        for path in ("/healthz", "/readyz"):  # asked by the loop itself, which does nothing else meanwhile
            assert get(port, path) == (503, b"gRPC's event loop did not answer within 0.3 s\n")
        assert await asyncio.to_thread(get, port, "/readyz") == (200, b"ready\n")


def test_a_loop_of_grpc_that_has_ended_is_not_alive():
    async def begin():
        return for_other_loops(lambda: True)

    with serving(ready=asyncio.run(begin())) as port:
        assert get(port, "/healthz")[0] == 503
