"""The device's bandwidth and matrix rate, and the memory in use."""

import psutil
import pytest
import torch

from server.engine import hardware
from server.engine.build import build_engine
from server.engine.hardware import MemoryMeter, last_cache_bytes, measure, measure_device, used_bytes
from server.messages import Measured
from server.settings import Settings
from tests.engine.harness import load
from tests.models_zoo import save_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_tiny("llama", tmp_path_factory.mktemp("llama")), weights="int4")


def test_the_best_of_several_counts(model, monkeypatch):
    clock = iter(range(10**6))
    measured = []

    def seconds(work, device):
        work()
        measured.append(0.5 if next(clock) == 2 else 2.0)  # one in the middle was the fastest
        return measured[-1]

    monkeypatch.setattr(hardware, "_seconds", seconds)
    monkeypatch.setattr(hardware, "last_cache_bytes", lambda: 17 << 20)
    found = measure(model.model)
    assert found.bandwidth == (4 * 17 << 20) / 0.5
    # One size is enough, since products take long: that of the packed weights has more multiply-adds.
    assert found.matrix_rate == 2 * 128 * 1024**2 / 2.0


def test_a_thorough_measurement(monkeypatch):
    """As ``make device`` does it: the same, from a buffer of its own size and repeated more often."""
    measured = []

    def seconds(work, device):
        work()
        measured.append(work)
        return 1.0 if len(measured) == 2 * 8 else 2.0  # the last of the readings was the fastest

    monkeypatch.setattr(hardware, "_seconds", seconds)
    monkeypatch.setattr(hardware, "last_cache_bytes", lambda: 99 << 20)
    assert measure_device(CPU, torch.float32, 80 << 20, 7) == Measured(80 << 20, 2 * 128**3 / 2.0)
    assert len(measured) == 2 * 8 + 7


def test_the_real_figures_are_of_this_world(model):
    found = measure(model.model)
    # From the slowest machine at its busiest to the fastest.
    assert 1e8 < found.bandwidth < 1e14
    assert 1e8 < found.matrix_rate < 1e16


def test_a_measurement_needs_free_memory(model, monkeypatch):
    monkeypatch.setattr(hardware, "available_bytes", lambda device: 100 << 20)
    with pytest.raises(RuntimeError, match="MiB of free memory"):
        measure(model.model)


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


def test_the_device_is_measured_at_start_if_that_is_asked_for(tmp_path, monkeypatch, caplog):
    folder = save_tiny("llama", tmp_path / "llama")

    def ready(**settings):
        settings |= {"device": "cpu", "weights": "float", "threads": torch.get_num_threads()}
        return build_engine(Settings(**settings), folder, lambda stage, fraction: None)[1]

    monkeypatch.setattr(hardware, "last_cache_bytes", lambda: 17 << 20)
    found = ready(measure_device=True).measured
    assert found.bandwidth > 0
    assert found.matrix_rate > 0

    def full(model):
        raise RuntimeError("it is full")

    monkeypatch.setattr("server.engine.build.measure", full)
    assert ready().measured is None
    assert not caplog.records
    assert ready(measure_device=True).measured is None  # and it serves
    assert "bandwidth and matrix rate were not measured: it is full" in caplog.text
