"""Servers to measure, started for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import psutil

from loadtest.deployment import Deployment
from loadtest.measuring.served import Served, event_loop
from loadtest.servers import Address, NotStartedError, serve
from longspan import LongspanError

MOST_STARTING = 8
"""Servers at the same time; most of a start is one thread's work."""

_SPARE = 0.9  # of the memory that is available; the rest is for this process and the page cache


class OpenError(RuntimeError):
    """Servers can't be measured; the message names all of them, with reasons.

    Attributes:
        reasons: by the deployment's name.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("\n".join(f"{name}: {reason}" for name, reason in reasons.items()))
        self.reasons = dict(reasons)


@contextmanager
def open_all(
    deployments: Sequence[Deployment], arguments: Sequence[str] = (), kv_memory: int | None = None
) -> Iterator[dict[str, Served]]:
    """A server for each deployment, all at once, while the block runs.

    An idle one takes no processor time, and they share the model's file in memory; see ``groups`` for a
    machine that can't hold all of them.

    Args:
        deployments: names are unique.
        arguments: of ``longspan serve``, for all.
        kv_memory: bytes of KV cache of each; by default the server's own size, a share of free memory.

    Yields:
        Targets by name, in the given order.

    Raises:
        OpenError: some did not start.
    """
    more = () if kv_memory is None else ("--kv-memory", str(kv_memory))
    with ExitStack() as stack:
        addresses = _start(stack, deployments, (*arguments, *more))
        run = stack.enter_context(event_loop())
        targets = {}
        for deployment, address in zip(deployments, addresses, strict=True):
            try:
                target = Served(run, address.host, address.port, (address.pid,))
            except LongspanError as error:
                raise OpenError({deployment.name: f"it started, but does not serve: {error}"}) from error
            stack.callback(target.close)
            targets[deployment.name] = target
        yield targets


def groups(deployments: Sequence[Deployment], most: int) -> list[tuple[Deployment, ...]]:
    """Which servers to have at the same time: the first, which is the base, is in every group.

    Args:
        deployments: at least one.
        most: in a group; at least 2, unless there is only one.
    """
    base, *others = deployments
    size = max(1, most - 1)
    return [(base, *others[at : at + size]) for at in range(0, len(others), size)] or [(base,)]


def most_at_once(pid: int, kv_memory: int, wanted: int) -> int:
    """How many servers like one that runs fit into this machine's memory with it.

    Args:
        pid: of a server that has just started.
        kv_memory: bytes of its KV cache, of which it has touched nothing yet.
        wanted: no more than this.

    Returns:
        At least 1, that one included.
    """
    process = psutil.Process(pid)
    own = sum(_own_bytes(each) for each in [process, *process.children(recursive=True)])
    free = psutil.virtual_memory().available * _SPARE - kv_memory
    return max(1, min(wanted, 1 + int(free // (own + kv_memory))))


def _own_bytes(process: psutil.Process) -> int:
    """Memory that ending it would free: weights that are mapped from a file are shared."""
    try:
        return int(process.memory_full_info().uss)
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return int(process.memory_info().rss)


def _start(stack: ExitStack, deployments: Sequence[Deployment], arguments: Sequence[str]) -> list[Address]:
    """Starts all; those that started are ended with the stack, also where others failed to."""
    names = [deployment.name for deployment in deployments]
    if len(set(names)) < len(names):
        raise ValueError("two deployments have one name")
    reasons: dict[str, str] = {}
    begun: list[int] = []
    contexts = [serve(*arguments, *each.arguments, begun=begun.append) for each in deployments]
    executor = ThreadPoolExecutor(min(MOST_STARTING, os.cpu_count() or 1))
    starting: list[Future[Address]] = []
    addresses = []
    try:
        for number, name in enumerate(names):
            # The first one packs the weights and keeps them, which the others would do as well beside it.
            if number < 2:
                starting += [executor.submit(each.__enter__) for each in (contexts[:1], contexts[1:])[number]]
            try:
                addresses.append(starting[number].result())
            except NotStartedError as error:
                reasons[name] = str(error)
    except KeyboardInterrupt:
        # Servers that still start are ended at once: a large model's start would take minutes.
        for pid in begun:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for context, future in zip(contexts, starting, strict=False):
            if future.done() and not future.cancelled() and future.exception() is None:
                stack.push(context.__exit__)
    if reasons:
        raise OpenError(reasons)
    return addresses
