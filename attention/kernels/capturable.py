"""Kernels whose decode steps can be captured once and replayed with other numbers."""

from __future__ import annotations

from abc import abstractmethod

from attention.kernels.base import Kernel, Kind, Plan
from attention.patterns.base import Pattern
from attention.step import DeviceBatch


class Capturable(Kernel[Plan]):
    """A kernel that can also plan a step from the device's part only.

    For such a step ``plan_captured``, ``update`` and ``forward`` ask nothing of the host, and their launches
    do not depend on positions and pages.
    """

    @abstractmethod
    def uncapturable(self, pattern: Pattern) -> str | None:
        """Why steps under a pattern can't be captured, as part of a sentence; ``None`` if they can."""

    @abstractmethod
    def plan_captured(self, kind: Kind, batch: DeviceBatch) -> Plan:
        """``plan`` of such a step."""
