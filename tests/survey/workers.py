"""Tries every row in a process of its own, so that one that hangs or dies is a row and not the end."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.survey.outcome import Outcome, Verdict

SECONDS = 150.0
"""How long one row may take."""


def run(
    names: Iterable[str],
    *,
    tell: Callable[[str, Outcome], None],
    processes: int = 2,
    work: Callable[[str, Connection], None] | None = None,
    seconds: float = SECONDS,
) -> None:
    """Tries rows of the page and tells each one's outcome as it comes.

    Args:
        names: of the rows.
        tell: called with each outcome.
        processes: how many at once.
        work: what a process does with its row, and where it sends the outcome; ``None`` for trying it.
        seconds: how long one row may take.
    """
    if work is None:
        # A process that has imported everything forks in no time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.survey.warm"])
        work = _work
    else:
        context = multiprocessing.get_context("fork")
    waiting = list(names)[::-1]
    running: dict[Connection, tuple[str, multiprocessing.process.BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop()
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name, there), daemon=True)
            process.start()
            there.close()
            running[here] = name, process, time.monotonic() + seconds
        soonest = min(deadline for *_, deadline in running.values()) - time.monotonic()
        ready = wait(list(running), timeout=max(soonest, 0))
        for here, (name, process, deadline) in list(running.items()):
            if here in ready:
                tell(name, _received(here, process))
            elif time.monotonic() > deadline:
                process.kill()
                process.join()
                tell(name, Outcome(Verdict.CRASHED, f"no end after {seconds:g} s"))
            else:
                continue
            here.close()
            del running[here]


def _received(here: Connection, process: multiprocessing.process.BaseProcess) -> Outcome:
    try:
        outcome: Outcome = here.recv()
    except EOFError:
        process.join()
        return Outcome(Verdict.CRASHED, f"the process ended with {process.exitcode}")
    process.join()
    return outcome


def _work(name: str, there: Connection) -> None:
    from tests.survey.rows import attempt
    from tests.survey.try_one import describe

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with tempfile.TemporaryDirectory(prefix="longspan-survey-") as folder:
        try:
            outcome = attempt(name, Path(folder))
        except Exception as error:  # a fault of the survey itself
            outcome = Outcome(Verdict.NOT_TRIED, f"the survey fails: {describe(error)}")
        there.send(outcome)
