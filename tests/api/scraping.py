"""The metrics' address for tests, with gets of its pages."""

from __future__ import annotations

import http.client
from contextlib import contextmanager

from server.observe.metrics import Metrics
from server.observe.metrics_server import listen
from tests.api.conftest import always


@contextmanager
def serving(ready=always, **options):
    metrics = Metrics()
    metrics.restarted("died")
    server, port = listen(metrics.registry, "127.0.0.1", 0, ready, **options)
    yield port
    server.close()


def get(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    """Status and body of a connection's only answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
