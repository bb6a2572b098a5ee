"""Measures a comparison: groups of servers, one after the other, until the evidence suffices."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from loadtest.compare.group import FullFailedError, Group, Listener, fail
from loadtest.compare.plan import Material, PlanError
from loadtest.compare.preflight import Found, try_all
from loadtest.compare.types import Comparison
from loadtest.deployment import Deployment
from loadtest.measuring.requests import reason
from loadtest.measuring.servers import OpenError, groups, open_all
from longspan import Client, LongspanError


def run(
    comparison: Comparison,
    found: Found,
    material: Material,
    deadline: float,
    listener: Listener,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Fills a comparison.

    Args:
        comparison: with the plan that ``preflight.look`` completed; what it has is not measured again.
        found: by ``preflight.look``.
        material: what is measured on.
        deadline: time of ``clock`` at which nothing more begins.
        listener: called with all that happens.
        clock: in seconds.

    Raises:
        PlanError: servers did not start; names all of them. Nothing was measured with them.
        FullFailedError: full attention can't be measured any more.
    """
    # Of the comparison's plan, which may have more candidates than this run was asked for.
    parts = groups(comparison.plan.served, max(2, found.at_once))
    if len(parts) > 1:
        try_all(parts, comparison.plan.arguments, found.kv_each, listener.doing)
    for number, part in enumerate(parts):
        now = clock()
        if now >= deadline:
            return  # servers that nothing can be asked any more are not started
        end = now + (deadline - now) / (len(parts) - number)
        # Readings take no server of their own, so they are asked beside the first group.
        readings = () if number else comparison.plan.readings
        _serve(comparison, found, material, part, readings, end, listener, clock)


def _serve(
    comparison: Comparison,
    found: Found,
    material: Material,
    part: Sequence[Deployment],
    readings: Sequence[Deployment],
    end: float,
    listener: Listener,
    clock: Callable[[], float],
) -> None:
    """Serves full attention and as many others as fit into memory, and measures them until ``end``."""
    begun = bool(comparison.speed or comparison.answers or comparison.text or comparison.memory)
    listener.doing(f"starting {len(part)} servers")
    try:
        with ExitStack() as stack:
            targets = stack.enter_context(open_all(part, comparison.plan.arguments, found.kv_each))
            clients = {
                name: stack.enter_context(Client(target.host, target.port))
                for name, target in targets.items()
            }
            for name, client in clients.items():
                attention = client.model_info().attention
                comparison.running[name] = {
                    "kernel": attention.kernel,
                    "reason": attention.reason,
                    "options": dict(attention.options),
                }
            clients |= {reading.name: clients[comparison.plan.full] for reading in readings}
            whole = (*part, *readings)
            Group(comparison, material, whole, targets, clients, end, listener, clock, found.rate).measure()
    except OpenError as error:
        if not begun:
            raise PlanError(str(error)) from error
        # The whole group is not measured, for the sake of those that are; a later run may.
        fail(comparison, error.reasons)
    except LongspanError as error:
        full = comparison.plan.full
        raise FullFailedError(f"{full} failed while it was measured: {reason(error)}") from error
