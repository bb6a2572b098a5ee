"""Whether a run measured the server, or its own client."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.load.measures import percentile
from loadtest.load.types import Worker
from loadtest.measuring.records import Record

# An open loop that sends later than this measures itself.
MOST_DELAY_SECONDS = 0.010
# A client process this busy, or an event loop this late, cannot say when a message arrived.
MOST_CPU_SHARE = 0.85
MOST_LOOP_LAG_SECONDS = 0.050


def objections(records: Sequence[Record], workers: Sequence[Worker]) -> list[str]:
    """Why the run's figures are not the server's, a sentence each; empty for a valid run."""
    found = []
    late = percentile(sorted(record.delay for record in records), 0.99)
    if late > MOST_DELAY_SECONDS:
        found.append(
            f"the client sent late: 1% of the requests went out {late * 1e3:.0f} ms or more after their time "
            f"({MOST_DELAY_SECONDS * 1e3:.0f} ms is allowed); use more --workers or a lower rate"
        )
    busiest = max((worker.cpu_share for worker in workers), default=0.0)
    if busiest > MOST_CPU_SHARE:
        found.append(
            f"a client process was busy {busiest:.0%} of the time ({MOST_CPU_SHARE:.0%} is allowed); "
            "use more --workers, or another machine for the client"
        )
    lag = max((worker.loop_lag for worker in workers), default=0.0)
    if lag > MOST_LOOP_LAG_SECONDS:
        found.append(
            f"a client process noticed events {lag * 1e3:.0f} ms late at the 99th percentile "
            f"({MOST_LOOP_LAG_SECONDS * 1e3:.0f} ms is allowed); the client lacks processor time: give it "
            "cores of its own"
        )
    if not records:
        found.append("no request was sent")
    return found
