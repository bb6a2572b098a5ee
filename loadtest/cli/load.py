"""``longspan load``: measures a server through gRPC, and a peer of it through HTTP."""

from __future__ import annotations

import ipaddress
import secrets
from pathlib import Path
from typing import Annotated

import typer

from loadtest.cli.checks import only_shown, require_numpy, require_templates, writable
from server.cli.connection import NAMES, Connection, connected
from server.cli.shared import fail

_METRICS_PORT = 9464
_SEEDS = 1 << 31
_WITH_SHOW = (
    *("show", "against", "csv_file", "html_file", "svg_file"),
    *(*NAMES, "metrics_host", "metrics_port", "metrics_tls", "no_metrics"),
)


@connected
def load(
    context: typer.Context,
    workload: Annotated[
        str,
        typer.Option(
            help="fixed, sharegpt, long-context, shared-prefix, multi-turn; a .jsonl file of prompts; or a "
            ".json file in ShareGPT's format."
        ),
    ] = "fixed",
    concurrency: Annotated[
        str | None,
        typer.Option(help="Closed loop: so many users, one request each; several: 1,8.", show_default="8"),
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Open loop: sessions per second; several: 0.5,1.")] = None,
    burstiness: Annotated[
        float, typer.Option(min=0.0, help="Open loop: 1 is Poisson, less is burstier, inf is evenly spaced.")
    ] = 1.0,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="1, 2, 4 ... users until the server is full, then rates below that."),
    ] = False,
    repeats: Annotated[
        int,
        typer.Option(min=1, help="How often each load is measured, there and back; from 6 on 95% intervals."),
    ] = 1,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Sessions per run. Without it: a number that suits the load.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="No session begins later than this into a run, in seconds.")
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Seconds without any message after which the server hangs, and the test ends.",
            show_default="600",
        ),
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Sessions before each run. Without it: one per user.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt, or the most.", show_default="128")
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of an output, or the most.", show_default="128; ShareGPT file: its own"
        ),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="shared-prefix: how many prefixes.")] = 4,
    prefix_tokens: Annotated[int, typer.Option(min=1, help="shared-prefix: tokens of each.")] = 512,
    turns: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions of a conversation.", show_default="4; ShareGPT file: only the first"
        ),
    ] = None,
    most_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="ShareGPT file: longer prompts are left out.")
    ] = 1024,
    most_total_tokens: Annotated[
        int, typer.Option(min=1, help="ShareGPT file: prompts and outputs with more together are left out.")
    ] = 2048,
    workers: Annotated[int, typer.Option(min=1, help="Client processes.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of workload and arrivals. Without it: a new one, so that prompts are new."),
    ] = None,
    target_ttft: Annotated[
        float | None, typer.Option(min=0.0, help="Goodput: seconds to the first token.")
    ] = None,
    target_tpot: Annotated[
        float | None, typer.Option(min=0.0, help="Goodput: seconds per output token.")
    ] = None,
    target_latency: Annotated[
        float | None, typer.Option(min=0.0, help="Goodput: seconds of a request.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write every request to this file, a row each.")
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", help="Write a report to this file, with --against also what changed."),
    ] = None,
    svg_file: Annotated[
        Path | None,
        typer.Option(
            "--svg", help="Draw throughput against latency into this file, with --against also before."
        ),
    ] = None,
    show: Annotated[Path | None, typer.Option(help="Show this result instead of measuring.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with this earlier result.")] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="Where the server's metrics are. Without it: --host.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Their port.")] = _METRICS_PORT,
    metrics_tls: Annotated[
        bool, typer.Option("--metrics-tls", help="They are served by TLS; --ca and --token count there, too.")
    ] = False,
    no_metrics: Annotated[
        bool, typer.Option("--no-metrics", help="Don't compare with the server's metrics.")
    ] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="A second target with OpenAI's HTTP interface, measured by turns, like http://HOST:8000/v1."
        ),
    ] = None,
    endpoint_only: Annotated[
        bool, typer.Option("--endpoint-only", help="Measure only the endpoint.")
    ] = False,
    endpoint_model: Annotated[str | None, typer.Option(help="The model that its requests name.")] = None,
    endpoint_name: Annotated[str, typer.Option(help="What tables call it.")] = "endpoint",
    endpoint_api: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    endpoint_prompts: Annotated[
        str, typer.Option(help="How completions get prompts of token ids: as ids, or as text.")
    ] = "ids",
    endpoint_extra: Annotated[
        str | None,
        typer.Option(help="JSON object: more fields of its requests.", show_default='{"ignore_eos": true}'),
    ] = None,
    endpoint_key_env: Annotated[
        str | None, typer.Option(help="Variable of the environment that holds its key.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Counts the endpoint's tokens: tokenizer.json, its folder, or a name on the Hugging Face "
            "Hub. Without it: its own count."
        ),
    ] = None,
    *,
    connection: Connection,
) -> None:
    """Measure a server: throughput and latencies under a load.

    Requests are greedy, with outputs of exact length. Ends with 0 if every run is valid and nothing failed,
    with 130 if it was stopped, else with 1; with --show always with 0.
    """
    from loadtest.cli.load_run import run, tell
    from loadtest.document import DocumentError
    from loadtest.load import asked
    from loadtest.load.result import load as read
    from loadtest.load.types import LoadTestError, Targets, Wanted

    if sum([concurrency is not None, rate is not None, sweep]) > 1:
        fail("--concurrency, --rate and --sweep exclude one another; give one")
    if endpoint is None and (endpoint_only or endpoint_model or tokenizer):
        fail("--endpoint-only, --endpoint-model and --tokenizer are about an --endpoint; give its address")
    files = {"--json": json_file, "--html": html_file, "--csv": csv_file, "--svg": svg_file}
    writable(files)
    if show is not None:
        only_shown(context, _WITH_SHOW)
    try:
        if html_file is not None or svg_file is not None:
            require_templates("--html" if html_file is not None else "--svg")
        earlier = read(against) if against is not None else None
        result = read(show) if show is not None else None
        if repeats > 1 or any(each is not None and each.repeated for each in (earlier, result)):
            require_numpy()
        one = asked.loads(concurrency, rate, burstiness)
        peer = None
        if endpoint is not None:
            peer = asked.endpoint(
                endpoint,
                model=endpoint_model,
                name=endpoint_name,
                api=endpoint_api,
                prompts=endpoint_prompts,
                tokenizer=tokenizer,
                extra=endpoint_extra,
                key_env=endpoint_key_env,
            )
    except (DocumentError, LoadTestError) as error:
        fail(str(error))
    if result is None:
        from loadtest.load.plan import PATIENCE, Plan
        from loadtest.load.sweep import Sweep

        connection.client().close()  # ends the command if the options are wrong
        host = metrics_host or connection.host
        if not (no_metrics or endpoint_only or _names_a_machine(host)):
            flag = "--metrics-host" if metrics_host else "--host"
            fail(f"{flag} {host} is no name of a machine: give --metrics-host, or --no-metrics")
        place = f"[{host}]" if ":" in host else host
        url = f"{'https' if metrics_tls else 'http'}://{place}:{metrics_port}/metrics"
        plan = Plan(
            host=connection.host,
            port=connection.port,
            # A call that is repeated would be measured as one that took longer.
            connect={**connection.options, "retries": False},
            metrics_url=None if no_metrics or endpoint_only else url,
            workload={},
            draw=lambda sessions, seed: [],
            loads=Sweep(256, burstiness) if sweep else one,
            sessions=requests,
            warmup=warmup,
            workers=workers,
            seed=secrets.randbelow(_SEEDS) if seed is None else seed,
            most_seconds=duration,
            targets=Targets(target_ttft, target_tpot, target_latency),
            repeats=repeats,
            endpoint=peer,
            endpoint_only=endpoint_only,
            patience=patience or PATIENCE,
        )
        wanted = Wanted(
            *(workload, prompt_tokens, output_tokens, groups, prefix_tokens, turns),
            *(most_prompt_tokens, most_total_tokens),
        )
        result = run(plan, wanted)
    tell(result, earlier, files, shown=show is not None)


def _names_a_machine(host: str) -> bool:
    """Whether it is a name or an address, and no target of gRPC's own."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return not {":", "/"} & {*host}
    return True
