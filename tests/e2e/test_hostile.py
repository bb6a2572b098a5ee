"""One message cannot stop the server: other streams go on, health answers, memory stays.

The bounds are a second where such messages took 17 seconds to minutes, since other tests run beside these.
"""

import pytest

from tests.e2e import hostile
from tests.e2e.server import Server

MOST_SECONDS = 1.0
MOST_GROWN = 300 << 20


@pytest.fixture(scope="module")
def server(tiny_packed):
    with Server(*tiny_packed) as running:
        yield running


def send(server, method, payload):
    """Sends a message again and again and checks what others see meanwhile; the answers by status."""
    with hostile.watched(server) as seen:
        hostile.send(server, method, payload, seen=seen)
    assert max(seen.gaps) < MOST_SECONDS
    assert max(seen.health) < MOST_SECONDS
    assert seen.grown < MOST_GROWN
    return seen.answers


@pytest.mark.parametrize("name", hostile.REFUSED)
def test_what_is_too_large_is_refused_and_stops_nothing(server, name):
    method, payload = hostile.REFUSED[name]
    assert send(server, method, payload()) == {"INVALID_ARGUMENT": 8}


@pytest.mark.parametrize("name", hostile.TAKEN)
def test_what_is_as_large_as_may_be_stops_nothing(server, name):
    with server.client() as client:
        info = client.model_info()
    method, payload = hostile.TAKEN[name]
    answers = send(server, method, payload(info))
    assert answers.keys() <= {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
