from __future__ import annotations

from collections.abc import Iterator

import pytest

from longspan import Client
from tests.scripted import Running, serving


@pytest.fixture
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(port=server.port, timeout=20) as connected:
        yield connected
