import signal

import psutil
import pytest

from tests.e2e.server import Server
from tests.processes import wait_ended


@pytest.fixture(scope="session")
def server(default_model):
    """One server of the real default model, for tests that leave it as they found it; it ends cleanly."""
    with Server("--measure-device") as running:
        engine = psutil.Process(running.engine_pid)
        yield running
        assert running.stop(signal.SIGINT) == 0
        wait_ended(engine, 20)


@pytest.fixture(scope="module")
def running():
    """Servers of the tiny model that tests of a file left running, by their arguments; each ends cleanly."""
    servers: dict[tuple[str, ...], Server] = {}
    yield servers
    codes = {arguments: server.stop() for arguments, server in servers.items()}
    assert not any(codes.values()), codes


@pytest.fixture
def started(tiny_packed, running):
    """Starts a server of the tiny model, or gives one of the same arguments that earlier tests have left.

    A start takes seconds of processor time. A test that ends its server comes after those that do not.
    """

    def start(*arguments: str) -> Server:
        if arguments not in running:
            running[arguments] = Server(*tiny_packed, *arguments)
        return running[arguments]

    yield start
    for arguments, server in list(running.items()):
        if server.process.poll() is not None:
            server.stop()
            del running[arguments]
    try:
        for server in running.values():
            server.wait_idle()
    except BaseException:  # no later test is to have one that is broken
        for server in running.values():
            server.stop()
        running.clear()
        raise
