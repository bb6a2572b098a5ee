"""``make bench``: starts a server of its own and measures it through gRPC, a few fixed workloads.

Random prompts, greedy, end of sequence ignored, prefix cache off, so that two machines or two versions do the
same work. The server and this client share the machine, as they do in the smallest deployment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from loadtest.load import result
from loadtest.load.measure import Plan, measure
from loadtest.load.result import Result
from loadtest.load.table import comparison, runs_table
from loadtest.load.types import ClosedLoop, Session
from loadtest.load.workloads import Shape, fixed
from loadtest.servers import Address, NotStartedError, serve
from longspan import Client

# (streams, requests, prompt tokens, output tokens); with one output token it is all prefill.
WORKLOADS = [
    *((1, 3, 128, 128), (8, 16, 128, 128), (32, 32, 128, 128)),
    *((8, 24, 128, 1), (1, 4, 2048, 1)),
    *((1, 2, 2048, 64), (4, 4, 2048, 64)),
]


def bench(address: Address, workloads: list[tuple[int, int, int, int]], console: Console) -> Result:
    """One run per workload, each after a warm-up of one session per stream."""
    with Client(address.host, address.port) as client:
        model = client.model_info()
    found: Result | None = None
    for streams, requests, prompt_tokens, output_tokens in workloads:

        def draw(
            count: int, seed: int, prompt_tokens: int = prompt_tokens, output_tokens: int = output_tokens
        ) -> list[Session]:
            vocabulary, context = model.vocabulary_size, model.context_length
            return fixed(Shape(count, prompt_tokens, output_tokens, vocabulary, context, seed))

        plan = Plan(
            host=address.host,
            port=address.port,
            metrics_url=address.metrics_url,
            workload={"name": "fixed", "prompt_tokens": prompt_tokens, "output_tokens": output_tokens},
            draw=draw,
            loads=[ClosedLoop(streams)],
            sessions=requests,
            warmup=1,
            workers=1,
            seed=0,
            most_seconds=None,
            targets=None,
        )
        one = measure(plan, console)
        if found is None:
            found = one
        else:
            found.runs += one.runs
    assert found is not None
    return found


def main() -> int:
    """Prints one table and, with ``--json``, keeps the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there as well")
    parser.add_argument("--against", metavar="FILE", type=Path, help="compare with this earlier result")
    parser.add_argument("serve", nargs="*", help="further arguments for `longspan serve`, after --")
    arguments = parser.parse_args()
    console = Console()
    try:
        earlier = result.load(arguments.against) if arguments.against else None
        with serve("--no-prefix-cache", *arguments.serve) as address:
            found = bench(address, WORKLOADS, Console(stderr=True))
    except (NotStartedError, result.ResultError) as error:
        print(error, file=sys.stderr)
        return 1
    console.print(runs_table(found))
    if earlier is not None:
        console.print(comparison(earlier, found))
    if arguments.json:
        result.save(found, arguments.json)
    return 1 if any(run.summary.failed for run in found.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
