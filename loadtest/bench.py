"""``make bench``: starts a server of its own and measures it through gRPC, a few fixed workloads.

Random prompts, greedy, end of sequence ignored, prefix cache off, so that two machines or two versions do the
same work. The server and this client share the machine, as they do in the smallest deployment.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loadtest.arguments import count
from loadtest.document import DocumentError
from loadtest.load import result
from loadtest.load.document import save
from loadtest.load.measure import STOPPED, measure
from loadtest.load.plan import Plan
from loadtest.load.result import Result
from loadtest.load.table import comparison, runs_table
from loadtest.load.types import ClosedLoop, LoadTestError, Session
from loadtest.load.workloads import Shape, fixed
from loadtest.servers import Address, NotStartedError, serve
from longspan import Client, LongspanError


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload.

    Attributes:
        streams: users at once.
        requests: of all of them.
        prompt_tokens: of each.
        output_tokens: of each; with a single one it is all prefill.
    """

    streams: int
    requests: int
    prompt_tokens: int
    output_tokens: int


WORKLOADS = (
    Workload(1, 3, 128, 128),
    Workload(8, 16, 128, 128),
    Workload(32, 32, 128, 128),
    Workload(8, 24, 128, 1),
    Workload(1, 4, 2048, 1),
    Workload(1, 2, 2048, 64),
    Workload(4, 4, 2048, 64),
)


_FAILURES = (NotStartedError, LoadTestError, LongspanError, DocumentError)


def bench(address: Address, workloads: tuple[Workload, ...], rounds: int, console: Console) -> Result:
    """Runs of every workload, each after a warm-up of one session. An early end is told in ``ended``.

    Args:
        address: of the server.
        workloads: what to measure.
        rounds: of all of them; runs that other work disturbed are repeated if there is more than one.
        console: for progress.

    Raises:
        longspan.LongspanError: the server does not answer.
        LoadTestError: the first run could not be made, its client process failed, the server's metrics can't
            be read, or the model's context is too short.
    """
    with Client(address.host, address.port) as client:
        model = client.model_info()
    vocabulary, context = model.vocabulary_size, model.context_length
    first, *others = (_plan(address, each, vocabulary, context, rounds) for each in workloads)
    return measure(first, console, others=others)


def _plan(address: Address, workload: Workload, vocabulary: int, context: int, rounds: int) -> Plan:
    def draw(count: int, seed: int) -> list[Session]:
        return fixed(Shape(count, workload.prompt_tokens, workload.output_tokens, vocabulary, context, seed))

    sizes = {"prompt_tokens": workload.prompt_tokens, "output_tokens": workload.output_tokens}
    return Plan(
        host=address.host,
        port=address.port,
        metrics_url=address.metrics_url,
        workload={"name": "fixed", **sizes},
        draw=draw,
        loads=[ClosedLoop(workload.streams)],
        sessions=workload.requests,
        warmup=1,
        repeats=rounds,
    )


def main() -> int:
    """Prints one table and, with ``--json``, keeps the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there as well")
    parser.add_argument("--against", metavar="FILE", type=Path, help="compare with this earlier result")
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=count,
        default=1,
        help="measure everything N times; intervals from 6 on",
    )
    parser.add_argument("serve", nargs="*", help="further arguments for `longspan serve`, after --")
    arguments = parser.parse_args()
    console = Console()
    try:
        earlier = result.load(arguments.against) if arguments.against else None
        with serve("--no-prefix-cache", "--measure-device", *arguments.serve) as address:
            found = bench(address, WORKLOADS, arguments.rounds, Console(stderr=True))
            if arguments.json and found.runs:  # before the server ends, which takes time
                save(found, arguments.json)
    except _FAILURES as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    if found.runs:
        console.print(runs_table(found))
        if earlier is not None:
            console.print(comparison(earlier, found))
    if found.ended:
        print(found.ended if found.runs else "nothing was measured", file=sys.stderr)
        return 130 if found.ended == STOPPED else 1
    return 1 if any(run.summary.failed for run in found.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
