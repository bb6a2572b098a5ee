"""``make bench``: starts a server of its own and measures it through gRPC, a few fixed workloads.

Random prompts, greedy, end of sequence ignored, prefix cache off, so that two machines or two versions do the
same work. The server and this client share the machine, as they do in the smallest deployment.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import re
import signal
import subprocess
import sys
from dataclasses import asdict

from loadtest.closed_loop import closed_loop, random_prompts
from loadtest.measures import Summary, summarize
from longspan import Client

# (streams, requests per stream, prompt tokens, output tokens)
WORKLOADS = [(1, 3, 128, 128), (8, 2, 128, 128), (32, 1, 128, 128), (1, 2, 2048, 64), (4, 1, 2048, 64)]


def measure(host: str, port: int, workload: tuple[int, int, int, int], vocabulary: int) -> Summary:
    """Warms the server up with one small request per stream, then runs the workload."""
    streams, rounds, prompt_tokens, output_tokens = workload
    for number, (count, length, output) in enumerate(
        [(streams, 16, 4), (streams * rounds, prompt_tokens, output_tokens)]
    ):
        records = asyncio.run(
            closed_loop(
                host,
                port,
                concurrency=streams,
                requests=count,
                prompts=random_prompts(number, length, vocabulary),
                output_tokens=output,
            )
        )
    return summarize(records)


def main() -> int:
    """Prints one line per workload and, with ``--json``, everything as JSON too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("serve", nargs="*", help="further arguments for `longspan serve`, after --")
    arguments = parser.parse_args()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "server.cli", "serve", "--no-prefix-cache"),
            *("--port", "0", "--metrics-port", "0", *arguments.serve),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        match = re.search(r" on (\S+):(\d+) ", server.stdout.readline())
        if match is None:
            print("the server did not start; see above", file=sys.stderr)
            return 1
        host, port = match[1], int(match[2])
        with Client(host, port) as client:
            model, info = client.model_info(), client.server_info()
        print(
            f"{model.name}, {model.dtype}, attention {model.attention.backend} ({model.attention.kernel}), "
            f"{info.device} {platform.machine()}, torch {info.versions['torch']}"
        )
        print("streams  prompt  output | output tok/s  prompt tok/s | TTFT p50  p99 ms | TPOT p50  p99 ms")
        results = []
        for workload in WORKLOADS:
            summary = measure(host, port, workload, model.vocabulary_size)
            streams, _, prompt_tokens, output_tokens = workload
            print(
                f"{streams:7d} {prompt_tokens:7d} {output_tokens:7d} | {summary.output_rate:12.1f} "
                f"{summary.prompt_rate:13.1f} | {summary.ttft[0] * 1e3:8.0f} {summary.ttft[1] * 1e3:7.0f} | "
                f"{summary.tpot[0] * 1e3:8.1f} {summary.tpot[1] * 1e3:7.1f}"
                + (f"  {summary.failed} FAILED" if summary.failed else ""),
                flush=True,
            )
            results.append(
                {"streams": streams, "prompt": prompt_tokens, "output": output_tokens, **asdict(summary)}
            )
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump({"model": model.name, "versions": dict(info.versions), "results": results}, file)
        return 1 if any(result["failed"] for result in results) else 0
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


if __name__ == "__main__":
    sys.exit(main())
