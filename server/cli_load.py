"""``longspan load``: measures a server through gRPC."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from server.cli_shared import DEFAULT_HOST, DEFAULT_PORT, UNBROKEN, Host, Port, fail, fail_call

if TYPE_CHECKING:
    from loadtest.load.measure import Plan
    from loadtest.load.result import Result
    from loadtest.load.types import Session

_METRICS_PORT = 9464


def load(
    workload: Annotated[
        str,
        typer.Option(
            help="fixed, sharegpt, long-context, shared-prefix, multi-turn, or a JSONL file of prompts."
        ),
    ] = "fixed",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: so many users, one request each. [default: 8]")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.0, help="Open loop: sessions per second.")] = None,
    burstiness: Annotated[
        float, typer.Option(min=0.0, help="Open loop: 1 is Poisson, less is burstier, inf is evenly spaced.")
    ] = 1.0,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="1, 2, 4 ... users until the server is full, then rates below that."),
    ] = False,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Sessions per run. Without it: a number that suits the load.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="No session begins later than this into a run, in seconds.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Sessions before each run. Without it: one per user.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, or the most.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an output, or the most.")] = 128,
    groups: Annotated[int, typer.Option(min=1, help="shared-prefix: how many prefixes.")] = 4,
    prefix_tokens: Annotated[int, typer.Option(min=1, help="shared-prefix: tokens of each.")] = 512,
    turns: Annotated[int, typer.Option(min=1, help="multi-turn: questions of a conversation.")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Client processes.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of workload and arrivals.")] = 0,
    target_ttft: Annotated[
        float | None, typer.Option(min=0.0, help="Goodput: seconds to the first token.")
    ] = None,
    target_tpot: Annotated[
        float | None, typer.Option(min=0.0, help="Goodput: seconds per output token.")
    ] = None,
    target_latency: Annotated[
        float | None, typer.Option(min=0.0, help="Goodput: seconds of a request.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with plots there; needs the extra load.")
    ] = None,
    show: Annotated[Path | None, typer.Option(help="Show this result instead of measuring.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with this earlier result.")] = None,
    host: Host = DEFAULT_HOST,
    port: Port = DEFAULT_PORT,
    metrics_host: Annotated[
        str | None, typer.Option(help="Where the server's metrics are. Without it: --host.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Their port.")] = _METRICS_PORT,
    no_metrics: Annotated[
        bool, typer.Option("--no-metrics", help="Don't compare with the server's metrics.")
    ] = False,
) -> None:
    """Measure a server: throughput, time to first token, time per token; greedy, outputs of exact length.

    Ends with 0 if every run is valid and nothing failed, else with 1.
    """
    from loadtest.load.result import ResultError
    from loadtest.load.result import load as read
    from loadtest.load.types import ClosedLoop, OpenLoop, Targets

    if sum([concurrency is not None, rate is not None, sweep]) > 1:
        fail("--concurrency, --rate and --sweep exclude one another; give one")
    if rate == 0 or burstiness == 0:
        fail("--rate and --burstiness must be more than 0")
    if html_file is not None:
        require_plots()
    try:
        earlier = read(against) if against is not None else None
        result = read(show) if show is not None else None
    except ResultError as error:
        fail(str(error))
    if result is None:
        from loadtest.load.measure import Plan
        from loadtest.load.sweep import Sweep

        url = f"http://{metrics_host or host}:{metrics_port}/metrics"
        described, draw = _workload(
            workload, prompt_tokens, output_tokens, groups, prefix_tokens, turns, host, port
        )
        one = OpenLoop(rate, burstiness) if rate is not None else ClosedLoop(concurrency or 8)
        result = _measure(
            Plan(
                host=host,
                port=port,
                metrics_url=None if no_metrics else url,
                workload=described,
                draw=draw,
                loads=Sweep(256, burstiness) if sweep else [one],
                sessions=requests,
                warmup=warmup,
                workers=workers,
                seed=seed,
                most_seconds=duration,
                targets=Targets(target_ttft, target_tpot, target_latency),
            )
        )
    _tell(result, earlier, json_file if show is None else None, html_file)


def _workload(
    name: str,
    prompt_tokens: int,
    output_tokens: int,
    groups: int,
    prefix_tokens: int,
    turns: int,
    host: str,
    port: int,
) -> tuple[dict[str, str | int], Callable[[int, int], list[Session]]]:
    """The workload's description, and what draws so many sessions of it from a seed."""
    from loadtest.load.workloads import WORKLOADS, Shape, WorkloadError, from_file
    from longspan import Client, LongspanError

    file = Path(name)
    if name not in WORKLOADS and file.suffix != ".jsonl":
        fail(f"there is no workload {name!r}; choose {', '.join(WORKLOADS)}, or a file that ends in .jsonl")
    try:
        with Client(host, port, timeout=30) as client:
            model = client.model_info()
    except LongspanError as error:
        fail_call(error)
    described: dict[str, str | int] = {
        "name": name,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }
    if name == "shared-prefix":
        described |= {"groups": groups, "prefix_tokens": prefix_tokens}
    if name == "multi-turn":
        described |= {"turns": turns}

    def draw(sessions: int, seed: int) -> list[Session]:
        shape = Shape(
            sessions=sessions,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            vocabulary=model.vocabulary_size,
            context=model.context_length,
            seed=seed,
            groups=groups,
            prefix_tokens=prefix_tokens,
            turns=turns,
        )
        return WORKLOADS[name](shape) if name in WORKLOADS else from_file(file, shape)

    try:
        draw(1, 0)
    except WorkloadError as error:
        fail(str(error))
    return described, draw


def _measure(plan: Plan) -> Result:
    from rich.console import Console

    from loadtest.load.driver import WorkerDiedError
    from loadtest.load.measure import measure
    from loadtest.load.reconcile import ScrapeError
    from loadtest.load.workloads import WorkloadError
    from longspan import LongspanError

    try:
        result = measure(plan, Console(stderr=True))
    except ScrapeError as error:
        fail(f"{error}; name their --metrics-host and --metrics-port, or leave them out with --no-metrics")
    except (WorkerDiedError, WorkloadError) as error:
        fail(str(error))
    except LongspanError as error:
        fail_call(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not result.runs:
        fail("nothing was measured", 130)
    return result


def _tell(result: Result, earlier: Result | None, json_file: Path | None, html_file: Path | None) -> NoReturn:
    from rich.console import Console

    from loadtest.load.result import save
    from loadtest.load.table import comparison, runs_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=UNBROKEN)
    console.print(runs_table(result))
    if earlier is not None:
        console.print(comparison(earlier, result))
    try:
        if json_file is not None:
            save(result, json_file)
        if html_file is not None:
            from loadtest.load.report import write_report

            write_report(result, html_file)
    except OSError as error:
        fail(f"the result can't be written: {error}")
    clean = all(not (run.objections or run.interrupted or run.summary.failed) for run in result.runs)
    raise typer.Exit(0 if clean else 1)


def require_plots() -> None:
    """Ends the command unless reports can be written."""
    if not find_spec("matplotlib"):
        fail("--html needs matplotlib; run: pip install 'longspan[load]'")
