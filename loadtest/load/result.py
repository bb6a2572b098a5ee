"""A load test's result as one JSON document, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest import document
from loadtest.document import DocumentError
from loadtest.load.device import DeviceUse
from loadtest.load.measures import weak
from loadtest.load.order_statistics import CONFIDENCE
from loadtest.load.reconcile import ServerSide
from loadtest.load.targets import LONGSPAN
from loadtest.load.types import Spread, Summary, Worker
from loadtest.measuring.records import Record
from loadtest.measuring.types import Weather

SCHEMA = "longspan-load/2"
_EARLIER = "longspan-load/1"


@dataclass(slots=True)
class Run:
    """One load and what came of it. Times in seconds; those of requests count from the run's first request.

    Attributes:
        load: ``kind`` closed with ``concurrency``, or open with ``rate`` and ``burstiness``.
        workload: ``name`` and what it was drawn with; ``fresh`` where no two prompts share a beginning.
        warmup: sessions sent before, at the same load, which count nowhere.
        interrupted: it was stopped before its end.
        objections: why the figures are not the server's; empty for a valid run.
        summary: the figures.
        workers: the client processes.
        server: what the server counted; ``None`` if its metrics were not read.
        disagreements: where client and server differ, a sentence each.
        requests: one object per request: ``session``, ``turn``, ``intended``, ``sent``, ``first`` and
            ``last`` token, ``ended``, ``prompt_tokens``, ``cached_tokens``, ``output_tokens``,
            ``expected_tokens``, ``code``, ``error``.
        device: what the run made of the server's device; ``None`` if the server's metrics were not read, and
            in documents of earlier versions.
        target: of the load, by name.
        repeat: from 0; runs of one label that differ in it are repeats of one another.
        seed: of this run's sessions and arrivals.
        weather: other use of this machine's processors; ``None`` if the target is on another, or it can't
            be told.
        attempt: 0, or how often this repeat was measured before, since other work disturbed it.
        disturbed: by what it was disturbed, a sentence; empty if it counts.
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
    target: str = LONGSPAN
    repeat: int = 0
    seed: int = 0
    weather: Weather | None = None
    attempt: int = 0
    disturbed: str = ""

    @property
    def label(self) -> str:
        """Load, sizes and target in a few letters; runs of one label are comparable."""
        sizes = [self.workload.get(key) for key in ("prompt_tokens", "output_tokens")]
        return (
            self.load_label
            + ("" if None in sizes else f", {sizes[0]}/{sizes[1]}")
            + ("" if self.target == LONGSPAN else f", {self.target}")
        )

    @property
    def load_label(self) -> str:
        """The load in a few letters."""
        return load_label(self.load)


def load_label(load: Mapping[str, Any]) -> str:
    """A load in a few letters; see ``Run.load``."""
    if load["kind"] == "closed":
        users = load["concurrency"]
        return f"{users} user{'s' if users > 1 else ''}"
    return f"{load['rate']:.3g}/s"


@dataclass(slots=True)
class Result:
    """All runs of one load test, and what they ran on.

    Attributes:
        created: UTC, ISO 8601.
        seed: of workload and arrivals.
        machine: of the client: ``cpu``, ``cores``, ``memory_bytes``, ``system``.
        versions: of Longspan and what both sides run on.
        server: as it says: ``model``, ``dtype``, ``kv_dtype``, ``device``, ``attention``, ``settings``; empty
            where only an endpoint was measured.
        runs: in the order in which they ran.
        peers: endpoints by name, with ``endpoint`` (its address), ``model``, ``api``, ``prompts``, ``tokens``
            (how they were counted) and ``extra``.
        confidence: of all intervals.
        notes: what to know of the document as a whole.
        ended: why it ended early; empty if all was measured.
    """

    created: str
    seed: int
    machine: dict[str, Any]
    versions: dict[str, str]
    server: dict[str, Any]
    runs: list[Run]
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    confidence: float = CONFIDENCE
    notes: list[str] = field(default_factory=list)
    ended: str = ""

    @property
    def repeated(self) -> bool:
        """It has loads that were measured more than once."""
        return len({run.label for run in self.runs}) < len(self.runs)


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
            "cached_tokens": record.cached_tokens,
            "output_tokens": record.tokens,
            "expected_tokens": record.expected_tokens,
            "code": record.code,
            "error": record.error,
        }
        for record in records
    ]


def load(path: Path) -> Result:
    """Reads a document, of this schema or the one before.

    Raises:
        DocumentError: it is none, or of another schema.
    """
    notes = []
    try:
        found = document.read(path, SCHEMA)
    except DocumentError as error:
        try:
            found = document.read(path, _EARLIER)
        except DocumentError:
            raise error from None
        notes = [
            f"{path.name} is of schema {_EARLIER}: its percentiles have no intervals, and its requests "
            "no cached tokens"
        ]
    try:
        found.pop("figures", None)  # they follow from the runs
        found["notes"] = [*found.pop("notes", []), *notes]
        runs = [_run(run) for run in found.pop("runs")]
        return Result(**found, runs=runs)
    except (KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{path} is damaged: {error}") from error


def _run(run: dict[str, Any]) -> Run:
    summary: dict[str, Any] = {
        name: _spread(value) if isinstance(value, dict) and "p50" in value else value
        for name, value in run.pop("summary").items()
    }
    server, device, weather = run.pop("server"), run.pop("device", None), run.pop("weather", None)
    return Run(
        **{**run, "workers": [Worker(**worker) for worker in run["workers"]]},
        summary=Summary(**summary),
        server=None if server is None else ServerSide(**{k: _number(v) for k, v in server.items()}),
        device=None if device is None else DeviceUse(**{k: _number(v) for k, v in device.items()}),
        weather=None if weather is None else Weather(**{k: _number(v) for k, v in weather.items()}),
    )


def _spread(value: dict[str, Any]) -> Spread:
    known = {"weak": weak(value["count"]), **value}
    return Spread(**{key: _number(number) for key, number in known.items()})


def _number(value: Any) -> Any:
    return math.nan if value is None else value
