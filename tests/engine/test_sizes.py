"""Sizes that no setting gives follow the device, and requests are held to those in force."""

from __future__ import annotations

from server.settings import Settings
from server.sizes import Sizes


def test_a_gpu_gets_larger_pages_steps_and_batches():
    cpu, gpu = (Sizes.of(Settings(), device) for device in ("cpu", "cuda"))
    assert cpu == (16, 0.3, 512, 64)
    assert all(larger > smaller for larger, smaller in zip(gpu, cpu, strict=True))
    assert gpu.max_batch_tokens >= gpu.max_running


def test_what_is_set_is_in_force_on_any_device():
    given = {"page_size": 32, "kv_memory_share": 0.5, "max_batch_tokens": 300, "max_running": 7}
    assert Sizes.of(Settings(**given), "cpu") == Sizes.of(Settings(**given), "cuda") == tuple(given.values())
    for device in ("cpu", "cuda"):
        assert Sizes.of(Settings(max_running=5000), device).max_batch_tokens == 5000
        assert Sizes.of(Settings(max_batch_tokens=9), device).max_running == 9
    assert Sizes.of(Settings(max_running=7), "cuda") == Sizes.of(Settings(), "cuda")._replace(max_running=7)
