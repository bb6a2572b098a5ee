"""Runs parts one after the other in a process of their own, until they end or the time is up.

A part may bring its process down (memory that is not there, a fault on the GPU) or not end; then the process
is ended with all that it started, and the next part gets a new one. The process and its descendants form a
group that ends when this process does, however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

NO_TIME = "left out: no time left"

_GRACE_SECONDS = 5.0

Part = Callable[..., Iterator[tuple[str, float | str]]]
Load = Callable[[], Mapping[str, Part]]


@dataclass(slots=True)
class Findings:
    """The results of the parts.

    Attributes:
        figures: numbers by name.
        facts: texts by name.
        troubles: of parts that did not get to their ends: why, as a sentence.
        failed: those of them that failed; the others were left out.
        seconds: that each part took.
    """

    figures: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    load: Load,
    parts: Mapping[str, float],
    arguments: tuple[Any, ...],
    end: float,
    *,
    needed: frozenset[str] = frozenset(),
    apart: frozenset[str] = frozenset(),
    say: Callable[[str], None] = lambda part: None,
) -> Findings:
    """Runs the parts in order.

    Args:
        load: gives the parts by name; called in their process, so that this one imports nothing of theirs.
            A function at a module's top level.
        parts: names, each with the seconds that it is expected to take. One that would not end in time is
            left out.
        arguments: of every part.
        end: monotonic time at which a part that still runs is ended.
        needed: parts without which those after them make no sense.
        apart: parts that get a process of their own.
        say: told the part that begins.
    """
    findings = Findings()
    worker: Worker | None = None
    lost: str | None = None
    try:
        for part, seconds in parts.items():
            if lost is not None:
                how = "failed" if lost in findings.failed else "was left out"
                findings.troubles[part] = f"left out: it needs the part {lost}, which {how}"
                continue
            began = time.monotonic()
            if end - began < seconds:
                findings.troubles[part] = NO_TIME
            else:
                if worker is not None and part in apart:
                    worker.end()
                    worker = None
                if worker is None:
                    worker = Worker(load, arguments)
                say(part)
                trouble = worker.part(part, findings, end)
                if trouble is not None:
                    findings.troubles[part] = trouble
                    if trouble != NO_TIME:
                        findings.failed.append(part)
                findings.seconds[part] = time.monotonic() - began
                if trouble is not None or part in apart:
                    worker.end(at_once=trouble is not None)
                    worker = None
            if part in needed and part in findings.troubles:
                lost = part
    finally:
        if worker is not None:
            worker.end(at_once=sys.exc_info()[0] is not None)
    return findings


class Worker:
    """The process, from here.

    Args:
        load: see ``run``.
        arguments: of every part.

    Attributes:
        pid: of the process.
    """

    def __init__(self, load: Load, arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA and gRPC survive no fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load, arguments))
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def part(self, name: str, findings: Findings, end: float, *more: Any) -> str | None:
        """Has the part run; why it did not get to its end, or ``None`` if it did.

        Args:
            name: of the part.
            findings: what it tells goes there.
            end: see ``run``.
            more: arguments of this part, after those of every part.
        """
        try:
            self._connection.send((name, more))
            while self._connection.poll(max(0.0, end - time.monotonic())):
                kind, *content = self._connection.recv()
                if kind == "figure":
                    findings.figures[content[0]] = content[1]
                elif kind == "fact":
                    findings.facts[content[0]] = content[1]
                else:
                    return None if kind == "done" else f"failed: {content[0]}"
        except (EOFError, OSError):
            self._process.join(_GRACE_SECONDS)
            code = self._process.exitcode
            how = f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
            return f"failed: its process {how}"
        return NO_TIME

    def end(self, at_once: bool = False) -> None:
        """Ends the process and all that it started; ``at_once`` where it would not end by itself."""
        self._connection.close()
        self._process.join(0 if at_once else _GRACE_SECONDS)
        if self._process.exitcode is None:
            self._signal(signal.SIGTERM)
            self._process.join(_GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, kind: signal.Signals) -> None:
        """To the process and its group; there is no group before it has made one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, kind)
        if self._process.exitcode is None and kind is signal.SIGKILL:
            self._process.kill()


def _serve(connection: Connection, load: Load, arguments: tuple[Any, ...]) -> None:
    """The process, from inside: runs the parts that it is told to, until its parent closes the connection."""
    os.setsid()
    os.dup2(2, 1)  # output of libraries does not belong to the result
    threading.Thread(target=_follow_parent, daemon=True).start()
    parts = load()
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            part, more = connection.recv()
            try:
                for name, value in parts[part](*arguments, *more):
                    connection.send(("fact" if isinstance(value, str) else "figure", name, value))
            except Exception as error:
                connection.send(("failed", " ".join(str(error).split()) or type(error).__name__))
            else:
                connection.send(("done",))


def _follow_parent() -> None:
    """Ends this process's group when its parent has ended, which can't do it any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
