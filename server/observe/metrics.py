"""Prometheus metrics: what is measured, in which buckets, and under which names."""

from __future__ import annotations

import itertools
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.engine.types import Ready, RefusedError, Stats, StepNews

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
)
_BETWEEN_TOKENS = (
    *(
        0.001,
        0.002,
        0.004,
        0.006,
        0.01,
        0.015,
        0.025,
        0.05,
        0.075,
        0.1,
        0.15,
        0.2,
        0.3,
        0.4,
        0.5,
        0.75,
        1,
        2.5,
    ),
)
_WHOLE_REQUEST = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960),
)

prometheus_client.disable_created_metrics()


def counts_up_to(most: int) -> list[int]:
    """Histogram buckets 1, 2, 5, 10, ... and ``most`` itself."""
    steps = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return [*itertools.takewhile(lambda step: step < most, steps), most]


class Metrics:
    """All metrics of one server, in a registry of their own. One label, ``model_name``, is on all but gRPC's.

    Attributes:
        registry: what ``/metrics`` shows.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._model = ""
        self._last = Stats()
        self.requests = self._counter(
            "requests",
            "Generation requests that ended. finish_reason: stop or length (if any sample ended so), "
            "aborted, or none where no answer was completed.",
            "finish_reason",
            "grpc_code",
        )
        self.rejections = self._counter(
            "request_rejections", "Generation requests turned away before the engine saw them.", "reason"
        )
        self._preemptions = self._counter("preemptions", "Sequences that gave up their pages.")
        self._running = self._gauge("requests_running", "Sequences that hold pages, after the last step.")
        self._waiting = self._gauge("requests_waiting", "Sequences that hold none, after the last step.")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Share of the KV cache held by sequences.")
        self._kv_pages = self._gauge("kv_pages", "Pages of the KV cache: used, cached or free.", "state")
        self._pages_read = self._counter(
            "attention_pages_read",
            "Pages of the KV cache that attention read, over engine steps, layers and sequences.",
        )
        self._pages_skipped = self._counter(
            "attention_pages_skipped", "Pages that full attention would have read besides."
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of requests on which the engine began, as in their usage."
        )
        self.generation_tokens = self._counter(
            "generation_tokens",
            "Tokens generated for requests: those of usage, and until then those of requests cut off.",
        )
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival until its first token.", _FIRST_TOKEN
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Between tokens of a sample, one observation per token; tokens that come together share it.",
            _BETWEEN_TOKENS,
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time between tokens of a completed sample of at least two tokens.",
            _BETWEEN_TOKENS,
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last event of completed requests.", _WHOLE_REQUEST
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds",
            "Arrival until the engine began, of completed requests.",
            _WHOLE_REQUEST,
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds",
            "From then to the first token, of completed requests.",
            _WHOLE_REQUEST,
        )
        self.decode_time = self._histogram(
            "request_decode_time_seconds", "First to last token of completed requests.", _WHOLE_REQUEST
        )
        # Their buckets depend on the context length, so they come with the model.
        self.request_prompt_tokens: Histogram | None = None
        self.request_generation_tokens: Histogram | None = None
        self._step_duration = self._histogram(
            "engine_step_duration_seconds", "Duration of an engine step.", _BETWEEN_TOKENS, "phase"
        )
        self._step_tokens: Histogram | None = None
        self._info = self._gauge(
            "info",
            "Always 1; the labels say what runs.",
            *("version", "model", "attention_backend", "attention_options"),
            *("kernel", "dtype", "weights", "page_size"),
        )

    def labels(self, *values: str) -> tuple[str, ...]:
        """Label values of a family that has ``model_name`` first."""
        return (self._model, *values)

    def name_model(self, model: str) -> None:
        """Sets ``model_name`` for all that is measured from now on."""
        self._model = model

    def identify(self, ready: Ready, *, version: str, weights: str, max_batch_tokens: int) -> None:
        """Takes what a new engine says of itself; its totals begin at 0."""
        self._last = Stats()
        self._info.clear()
        options = ",".join(f"{key}={value}" for key, value in sorted(ready.attention_options.items()))
        identity = (version, self._model, ready.attention_backend, options)
        runs = (ready.attention_kernel, ready.dtype, weights, str(ready.page_size))
        self._info.labels(*self.labels(*identity, *runs)).set(1)
        if self._step_tokens is None:
            lengths = counts_up_to(ready.context_length)
            self.request_prompt_tokens = self._histogram(
                "request_prompt_tokens", "Prompt tokens per completed request.", lengths
            )
            self.request_generation_tokens = self._histogram(
                "request_generation_tokens", "Tokens per completed sample.", lengths
            )
            self._step_tokens = self._histogram(
                "engine_step_batch_tokens", "Tokens computed per engine step.", counts_up_to(max_batch_tokens)
            )
        for family, _ in self._engine_totals():
            family.labels(*self.labels())  # present from the start, as rate() needs
        self.prompt_tokens.labels(*self.labels())
        self.generation_tokens.labels(*self.labels())
        self._load(Stats(pages_total=ready.pages_total))

    def engine_gone(self) -> None:
        """The engine's load is nothing, for it is dead."""
        self._load(Stats())

    def step(self, news: StepNews) -> None:
        """Takes one engine step."""
        stats, last = news.stats, self._last
        labels = self.labels()
        for family, total in self._engine_totals():
            family.labels(*labels).inc(getattr(stats, total) - getattr(last, total))
        self._last = stats
        self._load(stats)
        tokens = stats.prompt_tokens + stats.decode_tokens
        if tokens and self._step_tokens is not None:
            phase = "mixed" if stats.prompt_tokens and stats.decode_tokens else None
            phase = phase or ("prefill" if stats.prompt_tokens else "decode")
            self._step_duration.labels(*self.labels(phase)).observe(stats.step_seconds)
            self._step_tokens.labels(*labels).observe(tokens)

    def _engine_totals(self) -> list[tuple[Counter, str]]:
        """Counters of what the engine counts since its start, and the total's name in ``Stats``."""
        return [
            (self._preemptions, "preemptions"),
            (self._prefix_queries, "prefix_queries"),
            (self._prefix_hits, "prefix_hits"),
            (self._pages_read, "pages_read"),
            (self._pages_skipped, "pages_skipped"),
        ]

    def _load(self, stats: Stats) -> None:
        self._running.labels(*self.labels()).set(stats.running)
        self._waiting.labels(*self.labels()).set(stats.waiting)
        self._kv_usage.labels(*self.labels()).set(stats.pages_used / max(stats.pages_total, 1))
        free = stats.pages_total - stats.pages_used - stats.pages_cached
        for state, pages in (("used", stats.pages_used), ("cached", stats.pages_cached), ("free", free)):
            self._kv_pages.labels(*self.labels(state)).set(pages)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"longspan_{name}", words, ("model_name", *labels), registry=self.registry)

    def _gauge(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"longspan_{name}", words, ("model_name", *labels), registry=self.registry)

    def _histogram(
        self, name: str, words: str, buckets: tuple[float, ...] | list[int], *labels: str
    ) -> Histogram:
        return Histogram(
            f"longspan_{name}", words, ("model_name", *labels), buckets=buckets, registry=self.registry
        )


class GrpcMetrics:
    """Metrics of every gRPC method, health and reflection included."""

    def __init__(self, registry: CollectorRegistry) -> None:
        method = ("grpc_type", "grpc_service", "grpc_method")
        self.started = Counter("longspan_grpc_server_started", "Calls that began.", method, registry=registry)
        self.handled = Counter(
            "longspan_grpc_server_handled", "Calls that ended.", (*method, "grpc_code"), registry=registry
        )
        self.sent = Counter(
            "longspan_grpc_server_msg_sent", "Messages sent to clients.", method, registry=registry
        )
        self.seconds = Histogram(
            "longspan_grpc_server_handling_seconds",
            "Duration of calls.",
            (*method, "grpc_code"),
            buckets=_WHOLE_REQUEST,
            registry=registry,
        )


def listen(registry: CollectorRegistry, host: str, port: int) -> tuple[WSGIServer, int]:
    """Serves ``/metrics`` from a thread; port 0 takes a free one.

    Returns:
        The HTTP server, to be shut down, and its port.

    Raises:
        RefusedError: the address can't be had.
    """
    try:
        server, _ = prometheus_client.start_http_server(port, host, registry)
    except OSError as error:
        raise RefusedError(
            f"metrics can't listen on {host}:{port} ({error.strerror or error}); "
            "choose another address with --metrics-host and --metrics-port, or end what uses this one"
        ) from error
    return server, server.server_port
