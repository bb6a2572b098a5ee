"""A server that does not answer GetServerInfo is described without its settings."""

from __future__ import annotations

import grpc
import pytest

from loadtest.load.measure import describe
from loadtest.load.plan import Plan
from longspan import UnavailableError
from tests.scripted import MODEL, Mirror, fail, serving


def plan(port: int) -> Plan:
    return Plan(
        *("127.0.0.1", port, None, {}, lambda sessions, seed: [], [], 1, 0, 1, 0, None, None),
        connect={"retries": False},
    )


@pytest.mark.parametrize("code", [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE])
def test_switched_off_is_no_failure(monkeypatch, code):
    monkeypatch.setattr(Mirror, "GetServerInfo", lambda self, request, context: fail(context, code, "no"))
    with serving() as server:
        if code is grpc.StatusCode.UNAVAILABLE:
            with pytest.raises(UnavailableError):
                describe(plan(server.port))
            return
        found = describe(plan(server.port))
    assert (found.server["model"], found.server["settings"]) == (MODEL, {})
    assert found.versions["longspan"] == "not told"
