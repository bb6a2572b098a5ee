"""The server's own metrics over a run, and where they and the client disagree."""

from __future__ import annotations

import ipaddress
import math
import re
import ssl
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.load.types import LoadTestError, Summary
from longspan import ConnectOptions

_TIMEOUT_SECONDS = 10.0
# The client's clock starts before the network and the server's after it, so the client's times are longer; on
# one machine by milliseconds. More than this is worth a look.
_MOST_DIFFERENCE_SECONDS = 0.050

# Tokenizing a text may give other tokens than those it was generated as, though rarely.
_MOST_MISCOUNT = 0.02

_KIND = re.compile(r'\bkind="\w+"')

Samples = dict[str, float]


class ScrapeError(LoadTestError):
    """The metrics can't be read; the message says why."""


@dataclass(frozen=True, slots=True)
class ServerSide:
    """The server's counts during the run, all models together.

    Attributes:
        requests: generation requests that ended, however.
        prompt_tokens: of requests on which the engine began.
        output_tokens: generated.
        cached_tokens: prompt tokens found in the prefix cache.
        preemptions: of sequences.
        rejections: requests refused.
        ttft: mean time to first token, seconds.
        latency: mean latency of answered requests, seconds.
        queue_time: mean wait for the engine, seconds.
        step_time: mean duration of an engine step, seconds.
        steps: engine steps.
        draft_tokens: that the server guessed and verified.
        accepted_draft_tokens: of those, right.
    """

    requests: float
    prompt_tokens: float
    output_tokens: float
    cached_tokens: float
    preemptions: float
    rejections: float
    ttft: float
    latency: float
    queue_time: float
    step_time: float
    steps: float
    draft_tokens: float = 0.0
    accepted_draft_tokens: float = 0.0


def scrape(url: str, connect: ConnectOptions | None = None) -> Samples:
    """All of Longspan's samples, summed over labels; those of a kind also as ``name{kind="K"}``.

    Args:
        url: of the page.
        connect: roots (``ca``) of an https page's certificate, and a ``token``, which is shown by https and
            on this machine only.

    Raises:
        ScrapeError: no server answers, or it is no metrics page.
    """
    try:
        with _open(url, connect or {}) as response:
            text = response.read().decode()
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise ScrapeError(f"the metrics at {url} can't be read: {error}") from error
    samples: Samples = {}
    for line in text.splitlines():
        if not line.startswith("longspan_"):
            continue
        # Longspan's samples have no time stamp, and label values no line break: the value is the last word.
        name, _, value = line.rpartition(" ")
        name, _, labels = name.partition("{")
        kind = _KIND.search(labels)
        for key in [name, f"{name}{{{kind[0]}}}"] if kind else [name]:
            samples[key] = samples.get(key, 0.0) + float(value)
    if not samples:
        raise ScrapeError(f"{url} shows no metrics of Longspan; give the server's --metrics-port")
    return samples


def _open(url: str, connect: ConnectOptions) -> Any:
    parts = urllib.parse.urlsplit(url)
    local, request = _is_loopback(parts.hostname or ""), urllib.request.Request(url)
    token, ca = connect.get("token", "").strip(), connect.get("ca")
    if token and (local or parts.scheme == "https"):
        # Not to where the page may be redirected.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    handlers: list[urllib.request.BaseHandler] = []
    if local:
        handlers.append(urllib.request.ProxyHandler({}))  # one of the environment can't reach this machine
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=None if ca is None else Path(ca).expanduser())
        handlers.append(urllib.request.HTTPSHandler(context=context))
    return urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT_SECONDS)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_side(before: Samples, after: Samples) -> ServerSide:
    """The counts between two scrapes."""

    def gained(name: str) -> float:
        return after.get(f"longspan_{name}", 0.0) - before.get(f"longspan_{name}", 0.0)

    def mean(name: str) -> float:
        count = gained(f"{name}_count")
        return gained(f"{name}_sum") / count if count else math.nan

    return ServerSide(
        requests=gained("requests_total"),
        prompt_tokens=gained("prompt_tokens_total"),
        output_tokens=gained("generation_tokens_total"),
        cached_tokens=gained("prefix_cache_hits_total"),
        preemptions=gained("preemptions_total"),
        rejections=gained("request_rejections_total"),
        ttft=mean("time_to_first_token_seconds"),
        latency=mean("e2e_request_latency_seconds"),
        queue_time=mean("request_queue_time_seconds"),
        step_time=mean("engine_step_duration_seconds"),
        steps=gained("engine_step_duration_seconds_count"),
        draft_tokens=gained("draft_tokens_total"),
        accepted_draft_tokens=gained("accepted_draft_tokens_total"),
    )


def disagreements(client: Summary, server: ServerSide) -> list[str]:
    """Differences between client and server, a sentence each. Totals must be equal where nothing failed."""
    found = []
    if not client.failed:
        for what, ours, theirs in (
            ("requests", client.requests, server.requests),
            ("prompt tokens", client.prompt_tokens, server.prompt_tokens),
            ("output tokens", client.output_tokens, server.output_tokens),
        ):
            if ours != theirs:
                found.append(
                    f"{what}: the client counted {ours}, the server {theirs:.0f}; did another client use it?"
                )
    for what, seen, told in (
        ("time to first token", client.ttft.mean, server.ttft),
        ("latency", client.latency.mean, server.latency),
    ):
        if abs(seen - told) > max(_MOST_DIFFERENCE_SECONDS, 0.05 * told):
            found.append(
                f"mean {what}: {seen * 1e3:.0f} ms at the client, {told * 1e3:.0f} ms at the server; the "
                "difference is the network's, or the client's"
            )
    return found


def miscounts(summary: Summary) -> list[str]:
    """A sentence where an endpoint's count of output tokens differs from its tokenizer's."""
    ours, theirs = summary.output_tokens, summary.told_tokens
    if not theirs or summary.failed or abs(ours - theirs) <= _MOST_MISCOUNT * theirs:
        return []
    return [
        f"output tokens: the tokenizer counts {ours}, the endpoint {theirs}; is it its model's tokenizer?"
    ]
