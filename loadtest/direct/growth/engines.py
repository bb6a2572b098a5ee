"""An engine in a process of its own, as a target of rounds."""

from __future__ import annotations

import time
from collections.abc import Mapping

from loadtest.direct import work
from loadtest.direct.growth.types import Point, Variant
from loadtest.measuring.types import CannotMeasureError


class EngineProcess:
    """One variant's engine. Its process starts when it is needed, again after a point has brought it down.

    Args:
        variant: to be measured.
        folder: where the model lies.
        steps: timed in each visit.
        seconds: that one visit, or opening the engine, may take.
    """

    def __init__(self, variant: Variant, folder: str, steps: int, seconds: float) -> None:
        self._variant, self._folder, self._steps, self._seconds = variant, folder, steps, seconds
        self._worker: work.Worker | None = None
        self._refusal = ""

    @property
    def pids(self) -> tuple[int, ...]:
        """Id of the process; empty while there is none."""
        return () if self._worker is None else (self._worker.pid,)

    def open(self) -> None:
        """Starts the process, so that no visit has to.

        Raises:
            CannotMeasureError: the engine can't be had.
        """
        if self._refusal:
            raise CannotMeasureError(self._refusal)
        if self._worker is None:
            self._worker = work.Worker(_parts, (self._variant, self._folder))
            try:
                self._ask("ready")
            except CannotMeasureError as error:
                self._refusal = str(error)
                raise

    def measure(self, load: Point, seed: int) -> Mapping[str, float]:
        """Decode steps at a point; see ``Growth``.

        Raises:
            CannotMeasureError: there is no room, no time, or it brought the process down.
        """
        self.open()
        findings = self._ask("decode", load, self._steps, seed)
        if "no room" in findings.facts:
            raise CannotMeasureError(findings.facts["no room"])
        return findings.figures

    def close(self, at_once: bool = False) -> None:
        """Ends the process; ``at_once`` where it would not end by itself."""
        if self._worker is not None:
            self._worker.end(at_once)
            self._worker = None

    def _ask(self, part: str, *more: object) -> work.Findings:
        assert self._worker is not None
        findings = work.Findings()
        trouble = self._worker.part(part, findings, time.monotonic() + self._seconds, *more)
        if trouble is None:
            return findings
        self.close(at_once=True)
        if trouble == work.NO_TIME:
            raise CannotMeasureError(
                f"not measured within {self._seconds:g} seconds; give a longer --budget, or less to do"
            )
        raise CannotMeasureError(trouble.removeprefix("failed: "))


def _parts() -> Mapping[str, work.Part]:
    from loadtest.direct.growth import in_engine

    return {"ready": in_engine.ready, "decode": in_engine.decode}
