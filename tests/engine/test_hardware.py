"""What the device can do at best, and the memory in use."""

import math
import time

import psutil
import pytest
import torch

from loadtest.direct.device.machine import limits
from server.engine import hardware
from server.engine.hardware import MemoryMeter, last_cache_bytes, measure, used_bytes
from server.engine.process import Engine
from server.messages import Measured
from server.models.quantize import quantize
from tests.engine.harness import load, make_core
from tests.models_zoo import save_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = load(save_tiny("llama", tmp_path_factory.mktemp("llama")))
    quantize(loaded.model, "int4")
    return loaded


def finished(slices):
    """What a measurement gives, and in how many steps."""
    count = 0
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value, count
        count += 1


def test_a_measurement_in_many_short_steps(model, monkeypatch):
    clock = iter(range(10**6))
    measured = []

    def seconds(work, device):
        work()
        measured.append(0.5 if next(clock) == 2 else 2.0)  # one in the middle was the fastest
        return measured[-1]

    monkeypatch.setattr(hardware, "_seconds", seconds)
    monkeypatch.setattr(hardware, "last_cache_bytes", lambda: 17 << 20)
    found, steps = finished(measure(model.model))
    assert found.bandwidth == (4 * 17 << 20) / 0.5
    # One size is enough, since products take long: that of the packed weights has more multiply-adds.
    assert found.matrix_rate == 2 * 128 * 1024**2 / 2.0
    assert steps >= len(measured)


def test_a_thorough_measurement_in_one_go(monkeypatch):
    """As ``make device`` does it: the same, from a buffer of its own size and repeated more often."""
    measured = []

    def seconds(work, device):
        work()
        measured.append(work)
        return 1.0 if len(measured) == 2 * 8 else 2.0  # the last of the readings was the fastest

    monkeypatch.setattr(hardware, "_seconds", seconds)
    monkeypatch.setattr(hardware, "last_cache_bytes", lambda: 99 << 20)
    assert limits(CPU, torch.float32, 80 << 20, 7) == Measured(80 << 20, 2 * 128**3 / 2.0)
    assert len(measured) == 2 * 8 + 7


def test_the_real_figures_are_of_this_world(model):
    found, _ = finished(measure(model.model))
    # From the slowest machine at its busiest to the fastest.
    assert 1e8 < found.bandwidth < 1e14
    assert 1e8 < found.matrix_rate < 1e16


def test_a_measurement_needs_free_memory(model, monkeypatch):
    monkeypatch.setattr(hardware, "available_bytes", lambda device: 100 << 20)
    with pytest.raises(RuntimeError, match="MiB of free memory"):
        next(measure(model.model))


def test_the_parts_of_the_last_cache_are_added_up(tmp_path):
    for cpu, shared, size in (
        ("cpu0", "0-1", "32768K"),
        ("cpu1", "0-1", "32768K"),
        ("cpu2", "2-3", "16384K"),
    ):
        folder = tmp_path / cpu / "cache/index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    (tmp_path / "cpu3/cache/index3").mkdir(parents=True)
    assert last_cache_bytes(tmp_path) == 48 << 20
    assert last_cache_bytes(tmp_path / "none") == 32 << 20


def test_memory_in_use_is_looked_up_now_and_then(monkeypatch):
    rss = psutil.Process().memory_info().rss
    assert used_bytes(CPU) == pytest.approx(rss, rel=0.2)
    answers = iter([1, 2, 3])
    monkeypatch.setattr(hardware, "used_bytes", lambda device: next(answers))
    meter = MemoryMeter(CPU)
    assert [meter.used(now) for now in (10.0, 10.4, 10.6, 10.9, 99.0)] == [1, 1, 2, 2, 3]


class Wire:
    """An engine's end of the link: messages come when the test says so, and those it sends are kept."""

    def __init__(self, engine, quiet):
        self.quiet = iter(quiet)
        self.sent = []
        engine.send = self.sent.append
        engine._wire = self

    def poll(self, milliseconds):
        return not next(self.quiet)


def engine_at_rest():
    engine = Engine.__new__(Engine)
    engine._measured, engine._measure_at, engine._worked = None, 0.0, True
    return engine


def test_a_busy_engine_is_left_alone(model, monkeypatch):
    """What comes in ends the measurement at once; at the next rest it begins anew."""
    core = make_core(model)
    engine = engine_at_rest()
    begun, closed = [], []
    found = iter([Measured(1.0, 2.0), Measured(0.5, 3.0)])

    def slices(model):
        begun.append(model)
        try:
            for _ in range(3):
                yield
        finally:
            closed.append(model)
        return next(found)

    monkeypatch.setattr(hardware, "measure", slices)
    wire = Wire(engine, [True, True, False])
    engine._measure(core)
    assert (wire.sent, engine._measured, len(begun), len(closed)) == ([], None, 1, 1)
    assert engine._worked
    wire.quiet = iter([True] * 99)
    engine._measure(core)
    assert (wire.sent, len(begun), engine._worked) == ([Measured(1.0, 2.0)], 2, False)
    assert engine._measure_at > time.monotonic()
    engine._measure(core)
    assert wire.sent[1:] == [Measured(1.0, 3.0)]  # a busy machine looks slower: the best counts


def test_a_device_that_cannot_be_measured_still_serves(model, monkeypatch, caplog):
    def slices(model):
        raise RuntimeError("it is full")
        yield

    monkeypatch.setattr(hardware, "measure", slices)
    engine = engine_at_rest()
    wire = Wire(engine, [True])
    engine._measure(make_core(model))
    assert (wire.sent, engine._measured, engine._measure_at) == ([], None, math.inf)
    assert "not measured: RuntimeError('it is full')" in caplog.text
