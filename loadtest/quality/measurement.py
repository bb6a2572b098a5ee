"""Measurements on servers, run so that each server is started once and none beside another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from loadtest.deployment import Deployment
from loadtest.quality.types import Outcome
from loadtest.servers import NotStartedError, serve
from longspan import Client, LongspanError

T = TypeVar("T")


class MeasurementError(RuntimeError):
    """There is no figure; the message says why."""


class Measurement(Generic[T]):
    """Something to be measured on one deployment.

    Args:
        deployment: where.
        measure: what, through a client of the running server.
    """

    def __init__(self, deployment: Deployment, measure: Callable[[Client], T]) -> None:
        self.deployment = deployment
        self._measure = measure
        self._results: list[T] = []
        self._error = "it has not been measured"

    @property
    def result(self) -> T:
        """The figure.

        Raises:
            MeasurementError: there is none.
        """
        if not self._results:
            raise MeasurementError(f"{self.deployment.name}: {self._error}")
        return self._results[0]

    def run(self, client: Client) -> None:
        """Measures; what the server refuses becomes the reason that there is no result."""
        try:
            self._results = [self._measure(client)]
        except (LongspanError, ValueError) as error:
            self.fail(str(error))

    def fail(self, reason: str) -> None:
        """Notes why there is no result."""
        self._results, self._error = [], reason


@dataclass(frozen=True, slots=True)
class Check:
    """Measurements and what they ought to show.

    Attributes:
        test: its number.
        title: what it is about.
        measurements: all that ``judges`` ask for.
        judges: one outcome each, once everything is measured.
    """

    test: int
    title: str
    measurements: Sequence[Measurement[Any]]
    judges: Sequence[Callable[[], Outcome]]

    def outcomes(self) -> list[Outcome]:
        """What the judges say; a failed outcome where something could not be measured."""
        return [self._outcome(judge) for judge in self.judges]

    def _outcome(self, judge: Callable[[], Outcome]) -> Outcome:
        try:
            return judge()
        except MeasurementError as error:
            return Outcome(self.test, self.title, str(error), "a figure", False)


def run(checks: Iterable[Check], arguments: Sequence[str], tell: Callable[[str], None]) -> list[Outcome]:
    """Runs all measurements of the checks, one server at a time, and judges them.

    Args:
        checks: in the order in which their outcomes are to come.
        arguments: of ``longspan serve``, for every server.
        tell: told which server is being measured.
    """
    checks = list(checks)
    plan: dict[Deployment, list[Measurement[Any]]] = {}
    for check in checks:
        for measurement in check.measurements:
            plan.setdefault(measurement.deployment, []).append(measurement)
    for deployment, measurements in plan.items():
        tell(deployment.name)
        try:
            with (
                serve(*arguments, *deployment.arguments) as server,
                Client(server.host, server.port) as client,
            ):
                for measurement in measurements:
                    measurement.run(client)
        except NotStartedError as error:
            for measurement in measurements:
                measurement.fail(str(error).splitlines()[-1])  # the server's own reason
    return [outcome for check in checks for outcome in check.outcomes()]
