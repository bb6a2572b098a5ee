"""Settings and fixtures of all tests."""

import fcntl
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from server.models.resolve import resolve_model
from server.settings import Settings
from tests.kernels import share_kernels

# Threads that wait by spinning make every kernel many times slower when something else wants a core, and in
# these tests a server, a client and a model often do. torch, which reads this, is not imported yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In the background (``make test &``, nohup) interrupts or hang-ups are ignored, and a process passes that on
# to those it starts, of which tests interrupt some. A handler that does nothing is not passed on.
for _ignored in signal.SIGINT, signal.SIGHUP:
    if signal.getsignal(_ignored) is signal.SIG_IGN:
        signal.signal(_ignored, lambda number, frame: None)


# An example that a busy machine makes slow is no failure. Each run draws others, so that none needs many.
hypothesis_settings.register_profile("of a run", deadline=None, max_examples=50)
hypothesis_settings.load_profile("of a run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's Hugging Face folder, in the ordinary cache: fetched once per machine."""
    return resolve_model(None, Settings().cache_dir, lambda stage, fraction: None).folder


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of one run of the tests share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def tiny(of_the_run: Path) -> Path:
    """A small random model's folder, for servers."""
    from tests.models_zoo import save_tiny

    folder = of_the_run / "tiny" / "llama"
    with (of_the_run / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            save_tiny("llama", folder, max_position_embeddings=1024)
    return folder


@pytest.fixture(scope="session")
def tiny_packed(tiny: Path, of_the_run: Path) -> tuple[str, ...]:
    """Options of servers of ``tiny`` that start in half the time: only the first one imports transformers.

    It packs the weights and keeps them for all others, as with the default model.
    """
    cache = share_kernels(of_the_run / "packed")
    return ("--model", str(tiny), "--weights", "int8", "--cache-dir", str(cache), "--threads", "1")


@pytest.fixture(scope="session")
def tiny_settings(tiny_packed: tuple[str, ...]) -> dict[str, str]:
    """What ``tiny_packed`` has, as settings of a server in this process (``tests.e2e.here``)."""
    names = (option.removeprefix("--").replace("-", "_") for option in tiny_packed[::2])
    return dict(zip(names, tiny_packed[1::2], strict=True))
