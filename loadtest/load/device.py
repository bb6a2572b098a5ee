"""How hard a run worked the server's device: memory, and shares of what it can do at best."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from loadtest.load.reconcile import Samples, ScrapeError, scrape
from longspan import ConnectOptions

_SAMPLE_SECONDS = 1.0
_USED, _TOTAL = (f'longspan_device_memory_bytes{{kind="{kind}"}}' for kind in ("used", "total"))
_BANDWIDTH = "longspan_device_memory_bandwidth_bytes_per_second"
_MATRIX_RATE = "longspan_device_matrix_flops_per_second"
_BYTES = "longspan_engine_bytes_total"
_FLOPS = "longspan_engine_flops_total"
_SECONDS = "longspan_engine_step_duration_seconds_sum"


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A run's use of the device by the server's own count; NaN where it was not measured.

    Attributes:
        name: the device, as the server calls it.
        memory_total: bytes that it has.
        memory_used: most bytes in use at any look during the run, once a second; on a CPU by the engine.
        bandwidth: bytes that can be read from its memory per second.
        matrix_rate: operations of a matrix product that it can do per second.
        bytes_moved: that the run's steps had to move.
        flops: operations that the run's steps had to do.
        step_seconds: that the run's steps took together.
        bandwidth_share: ``bytes_moved / step_seconds / bandwidth``.
        matrix_share: ``flops / step_seconds / matrix_rate``.
        unmeasured: why a share is missing, a sentence each.
    """

    name: str
    memory_total: float
    memory_used: float
    bandwidth: float
    matrix_rate: float
    bytes_moved: float
    flops: float
    step_seconds: float
    bandwidth_share: float
    matrix_share: float
    unmeasured: list[str]


def device_use(name: str, scrapes: Sequence[Samples]) -> DeviceUse:
    """A run's use of the device.

    Shares are of the time in which the engine computed, not of the run's wall time: they tell how well it
    computed, not whether the load kept it busy.

    Args:
        name: the device.
        scrapes: of the server's metrics in order, from just before the run until just after it.

    Example:
        Steps of 10 seconds together moved 84 GB and did 300 billion operations, on a device that reads 21 GB
        and does 200 billion operations per second: shares of 84 / 10 / 21 = 0.4 and 300 / 10 / 200 = 0.15.
    """
    before, after = scrapes[0], scrapes[-1]

    def gained(metric: str) -> float:
        return after.get(metric, math.nan) - before.get(metric, 0.0)

    seconds = gained(_SECONDS)
    figures = {}
    missing: dict[str, list[str]] = {}
    for what, best, worked in (
        ("memory bandwidth", _BANDWIDTH, gained(_BYTES)),
        ("matrix rate", _MATRIX_RATE, gained(_FLOPS)),
    ):
        share, reason = _share(after, best, worked, seconds)
        figures[what] = share
        if reason:
            missing.setdefault(reason, []).append(what)
    return DeviceUse(
        name=name,
        memory_total=after.get(_TOTAL, math.nan),
        memory_used=max((scrape[_USED] for scrape in scrapes if _USED in scrape), default=math.nan),
        bandwidth=after.get(_BANDWIDTH, math.nan),
        matrix_rate=after.get(_MATRIX_RATE, math.nan),
        bytes_moved=gained(_BYTES),
        flops=gained(_FLOPS),
        step_seconds=seconds,
        bandwidth_share=figures["memory bandwidth"],
        matrix_share=figures["matrix rate"],
        unmeasured=[
            f"share of {' and of '.join(whats)} not measured: {reason}" for reason, whats in missing.items()
        ],
    )


def _share(after: Samples, best: str, worked: float, seconds: float) -> tuple[float, str]:
    """A share, or NaN and the reason."""
    if _BYTES not in after:
        return math.nan, "the server's metrics say nothing of it"
    if best not in after:
        return math.nan, "the server has not measured its device; start it with --measure-device"
    if not seconds > 0:
        return math.nan, "the engine took no step"
    share = worked / seconds / after[best]
    if share > 1:
        return math.nan, (
            f"it would be {share:.2f}; what steps read stayed in the processor's caches, or something else "
            "kept the device busy when the server measured it"
        )
    return share, ""


@contextmanager
def watched(url: str | None, connect: ConnectOptions | None = None) -> Iterator[list[Samples]]:
    """Scrapes once a second while the block runs, as ``scrape`` is told; without an address, nothing.

    A scrape that fails is left out: the one after the run says what is wrong.
    """
    scrapes: list[Samples] = []
    if url is None:
        yield scrapes
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            with suppress(ScrapeError):
                scrapes.append(scrape(url, connect))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield scrapes
    finally:
        ended.set()
        watcher.join()
