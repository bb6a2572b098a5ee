"""A load test's result as one JSON document, and back."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.load.device import DeviceUse
from loadtest.load.reconcile import ServerSide
from loadtest.load.types import Record, Spread, Summary, Worker

SCHEMA = "longspan-load/1"


class ResultError(ValueError):
    """A file is no result of this schema; the message says what it is."""


@dataclass(slots=True)
class Run:
    """One load and what came of it. Times in seconds; those of requests count from the run's first request.

    Attributes:
        load: ``kind`` closed with ``concurrency``, or open with ``rate`` and ``burstiness``.
        workload: ``name`` and what it was drawn with.
        warmup: sessions sent before, at the same load, which count nowhere.
        interrupted: it was stopped before its end.
        objections: why the figures are not the server's; empty for a valid run.
        summary: the figures.
        workers: the client processes.
        server: what the server counted; ``None`` if its metrics were not read.
        disagreements: where client and server differ, a sentence each.
        requests: one object per request: ``session``, ``turn``, ``intended``, ``sent``, ``first`` and
            ``last`` token, ``ended``, ``prompt_tokens``, ``output_tokens``, ``code``.
        device: what the run made of the server's device; ``None`` if the server's metrics were not read, and
            in documents of earlier versions.
    """

    load: dict[str, Any]
    workload: dict[str, Any]
    warmup: int
    interrupted: bool
    objections: list[str]
    summary: Summary
    workers: list[Worker]
    server: ServerSide | None
    disagreements: list[str]
    requests: list[dict[str, Any]] = field(default_factory=list)
    device: DeviceUse | None = None

    @property
    def label(self) -> str:
        """Load and sizes in a few letters; runs of one label are comparable."""
        sizes = [self.workload.get(key) for key in ("prompt_tokens", "output_tokens")]
        return self.load_label + ("" if None in sizes else f", {sizes[0]}/{sizes[1]}")

    @property
    def load_label(self) -> str:
        """The load in a few letters."""
        if self.load["kind"] == "closed":
            users = self.load["concurrency"]
            return f"{users} user{'s' if users > 1 else ''}"
        return f"{self.load['rate']:.3g}/s"


@dataclass(slots=True)
class Result:
    """All runs of one load test, and what they ran on.

    Attributes:
        created: UTC, ISO 8601.
        seed: of workload and arrivals.
        machine: of the client: ``cpu``, ``cores``, ``memory_bytes``, ``system``.
        versions: of Longspan and what both sides run on.
        server: as it says: ``model``, ``dtype``, ``kv_dtype``, ``device``, ``attention``, ``settings``.
        runs: in the order in which they ran.
    """

    created: str
    seed: int
    machine: dict[str, Any]
    versions: dict[str, str]
    server: dict[str, Any]
    runs: list[Run]


def condense(records: list[Record]) -> list[dict[str, Any]]:
    """Records for the document."""
    start = min((record.sent for record in records), default=0.0)

    def since(when: float) -> float:
        return round(when - start, 6)

    return [
        {
            "session": record.session,
            "turn": record.turn,
            "intended": since(record.intended),
            "sent": since(record.sent),
            "first": since(record.arrivals[0][0]) if record.arrivals else None,
            "last": since(record.arrivals[-1][0]) if record.arrivals else None,
            "ended": since(record.ended),
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.tokens,
            "code": record.code,
        }
        for record in records
    ]


def machine() -> dict[str, Any]:
    """What this process runs on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, cpu).partition(":")[2].strip() or cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(terse=True),
    }


def save(result: Result, path: Path) -> None:
    """Writes the document; what is no number becomes null."""
    path.write_text(json.dumps({"schema": SCHEMA, **_plain(asdict(result))}, indent=1) + "\n")


def load(path: Path) -> Result:
    """Reads a document.

    Raises:
        ResultError: it is none, or of another schema.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} can't be read: {error}") from error
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
        raise ResultError(f"{path} is no result of longspan load ({SCHEMA})")
    try:
        runs = [_run(run) for run in document.pop("runs")]
        return Result(**document, runs=runs)
    except (KeyError, TypeError) as error:
        raise ResultError(f"{path} is damaged: {error}") from error


def _run(run: dict[str, Any]) -> Run:
    summary: dict[str, Any] = {
        name: Spread(**{key: _number(number) for key, number in value.items()})
        if isinstance(value, dict) and "p50" in value
        else value
        for name, value in run.pop("summary").items()
    }
    server, device = run.pop("server"), run.pop("device", None)
    return Run(
        **{**run, "workers": [Worker(**worker) for worker in run["workers"]]},
        summary=Summary(**summary),
        server=None if server is None else ServerSide(**{k: _number(v) for k, v in server.items()}),
        device=None if device is None else DeviceUse(**{k: _number(v) for k, v in device.items()}),
    )


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
