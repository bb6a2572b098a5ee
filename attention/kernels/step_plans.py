"""A kernel's plans of one step, and the step's written tokens for patterns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Generic

from attention.batch import AttentionBatch
from attention.kernels.base import Kernel, Kind, Plan
from attention.kernels.capturable import Capturable
from attention.patterns.written import Written
from attention.registry import UnsupportedError
from attention.step import DeviceBatch


class StepPlans(Generic[Plan]):
    """A kernel's plans of one step, each made when the first layer of its kind runs.

    Args:
        kernel: makes the plans.
        batch: the step. If it is only the device's part, the kernel must be ``Capturable``.

    Raises:
        UnsupportedError: the kernel is not ``Capturable``, but would have to be.
    """

    def __init__(self, kernel: Kernel[Plan], batch: AttentionBatch | DeviceBatch) -> None:
        self._make: Callable[[Kind], Plan]
        self._write: Callable[[], Written]
        if isinstance(batch, AttentionBatch):
            self._make = partial(kernel.plan, batch=batch)
            self._write = partial(Written.known, batch.host, batch.device)
        elif isinstance(kernel, Capturable):
            self._make = partial(kernel.plan_captured, batch=batch)
            self._write = partial(Written.captured, batch)
        else:
            raise UnsupportedError(
                f"kernel {kernel.name} plans every step on the host, and can't be captured"
            )
        self._plans: dict[Kind, Plan] = {}
        self._written: Written | None = None

    def of(self, kind: Kind) -> Plan:
        """The plan for layers of this kind."""
        if kind not in self._plans:
            self._plans[kind] = self._make(kind)
        return self._plans[kind]

    @property
    def written(self) -> Written:
        """The tokens that the step writes, for every layer's pattern."""
        if self._written is None:
            self._written = self._write()
        return self._written
