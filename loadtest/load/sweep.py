"""Which loads to run, one after the other, to find out what a server can do."""

from __future__ import annotations

from collections.abc import Iterator

from loadtest.load.types import ClosedLoop, Load, OpenLoop, Summary

# Twice the users bring less than this: the server is full.
_LEAST_GAIN = 1.05
_SHARES = (0.25, 0.5, 0.75, 0.9)


class Sweep:
    """One user, then twice as many each time until the server is full, then open loops below that rate.

    Iterate over it for the loads, and pass the outcome of each to ``add`` before the next.

    Args:
        most_users: where to end at the latest.
        burstiness: of the open loops.
    """

    def __init__(self, most_users: int, burstiness: float = 1.0) -> None:
        self._most = most_users
        self._burstiness = burstiness
        self._summaries: list[Summary] = []

    def add(self, summary: Summary) -> None:
        """Takes the figures of the load that was given last."""
        self._summaries.append(summary)

    @property
    def full(self) -> bool:
        """The last doubling of users brought no more tokens and made the first ones later, or all failed."""
        if self._summaries and not self._summaries[-1].request_rate:
            return True
        if len(self._summaries) < 2:
            return False
        before, now = self._summaries[-2:]
        return now.output_rate < _LEAST_GAIN * before.output_rate and now.ttft.p50 > before.ttft.p50

    def __iter__(self) -> Iterator[Load]:
        users = 1
        while users <= self._most and not self.full:
            yield ClosedLoop(users)
            users *= 2
        most = max((summary.request_rate for summary in self._summaries), default=0.0)
        if most:
            for share in _SHARES:
                yield OpenLoop(most * share, self._burstiness)
