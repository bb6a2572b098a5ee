"""Several requests to one server at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from longspan import DeadlineError, LongspanError, UnavailableError

Result = TypeVar("Result")

_MOST = 8  # calls in flight


def at_once(calls: Sequence[Callable[[], Result]]) -> list[Result | LongspanError]:
    """Results of all calls, in their order; where the server refuses one, its error.

    Args:
        calls: each makes a request and waits for it.

    Raises:
        UnavailableError: the server has ended; the calls that are left are not made.
        DeadlineError: it hangs; likewise.
    """
    pool = ThreadPoolExecutor(_MOST)
    try:
        futures = [pool.submit(_outcome, call) for call in calls]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]
    finally:
        # An interrupted run does not wait for prompts that take minutes.
        pool.shutdown(wait=False, cancel_futures=True)


def _outcome(call: Callable[[], Result]) -> Result | LongspanError:
    try:
        return call()
    except (UnavailableError, DeadlineError):
        raise
    except LongspanError as error:
        return error
