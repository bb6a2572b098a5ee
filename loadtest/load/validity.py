"""Whether a run measured the server, or its own client."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.load.measures import percentile
from loadtest.load.types import Record, Worker
from loadtest.measuring.types import Weather

# An open loop that sends later than this measures itself.
MOST_DELAY_SECONDS = 0.010
# A client process this busy, or an event loop this late, cannot say when a message arrived.
MOST_CPU_SHARE = 0.85
MOST_LOOP_LAG_SECONDS = 0.050


# What others take of this machine, client and server lack; a tenth of it is beyond what repeats show anyway.
MOST_FOREIGN_SHARE = 0.10


def objections(
    records: Sequence[Record], workers: Sequence[Worker], weather: Weather | None = None
) -> list[str]:
    """Why the run's figures are not the server's, a sentence each; empty for a valid run.

    Args:
        records: of the run.
        workers: its client processes.
        weather: what else used this machine's processors; ``None`` if the target is on another.
    """
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
    for share, who in (
        ((weather.foreign, "other processes used"), (weather.stolen, "the hypervisor gave others"))
        if weather is not None
        else ()
    ):
        if share > MOST_FOREIGN_SHARE:
            found.append(
                f"{who} {share:.0%} of this machine's processor time while client and server shared it "
                f"({MOST_FOREIGN_SHARE:.0%} is allowed); end what else runs here, or take another machine"
            )
    if weather is not None and weather.throttled > MOST_FOREIGN_SHARE:
        found.append(
            f"a quota took {weather.throttled:.0%} of this machine's processor time away "
            f"({MOST_FOREIGN_SHARE:.0%} is allowed); raise the container's limit"
        )
    if not records:
        found.append("no request was sent")
    return found
