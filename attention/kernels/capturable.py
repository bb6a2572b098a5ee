"""Kernels whose decode steps can be captured once and replayed with other numbers."""

from __future__ import annotations

from abc import abstractmethod

from attention.kernels.base import Kernel, Kind, Plan
from attention.patterns.base import Pattern
from attention.step import DeviceBatch


class Capturable(Kernel[Plan]):
    """A kernel that can also plan a step of which the device alone knows.

    ``plan_captured``, ``update`` and ``forward`` of such a step ask nothing of the host, and launch the same
    whatever positions and pages are.
    """

    @abstractmethod
    def uncapturable(self, pattern: Pattern) -> str | None:
        """Why steps under a pattern can't be captured, as part of a sentence; ``None`` if they can."""

    @abstractmethod
    def plan_captured(self, kind: Kind, batch: DeviceBatch) -> Plan:
        """``plan`` of such a step."""
