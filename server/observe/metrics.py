"""Prometheus metrics: their names, meaning and buckets."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.messages import Ready, Stats, StepOutput
from server.observe.totals import EngineTotals

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
        step_age: tells for how long the engine has been in the same step.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._model = ""
        # Computed when scraped.
        self._totals = EngineTotals()
        self.registry.register(self._totals)
        self._load = Stats()
        self.step_age: Callable[[], float] = float
        self.requests = self._counter(
            "requests",
            "Requests to the engine that ended. finish_reason: stop or length (if any sample ended so; an "
            "encoder's answers are stop), aborted, or none where no answer was completed.",
            "finish_reason",
            "grpc_code",
        )
        self.rejections = self._counter(
            "request_rejections", "Requests turned away before the engine saw them.", "reason"
        )
        self._running = self._gauge("requests_running", "Sequences that hold pages, after the last step.")
        self._waiting = self._gauge("requests_waiting", "Sequences that hold none, after the last step.")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Share of the KV cache held by sequences.")
        self._kv_pages = self._gauge("kv_pages", "Pages of the KV cache: used, cached or free.", "state")
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of requests on which the engine began, as in their usage."
        )
        self.generation_tokens = self._counter(
            "generation_tokens",
            "Tokens generated for requests: those of usage, and until then those of requests cut off.",
        )
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
        self._step_age = self._gauge(
            "engine_step_age_seconds",
            "How long the engine has been in the same step, or has left a request unread; 0 while it waits.",
        )
        self._restarts = self._counter(
            "engine_restarts",
            "Engines started in place of one that failed. reason: it died, hung, or did not become ready.",
            "reason",
        )
        self._threads = self._gauge(
            "engine_threads",
            "CPU threads that compute steps; fewer than --threads where other processes take cores.",
        )
        self._memory = self._gauge(
            "device_memory_bytes",
            "Memory of the engine's device. kind: total, used (on a CPU by the engine process alone), and "
            "what the engine set apart of it: kv, weights.",
            "kind",
        )
        self._bandwidth = self._gauge(
            "device_memory_bandwidth_bytes_per_second",
            "Fastest reading from the device's memory, if measured at start (--measure-device).",
        )
        self._matrix_rate = self._gauge(
            "device_matrix_flops_per_second",
            "Fastest matrix product on the device, in the form of the model's weights, if measured at start.",
        )
        self._durations: dict[str, Histogram] = {}
        self._info = self._gauge(
            "info",
            "Always 1; the labels say what runs.",
            *("version", "model", "attention_backend", "attention_options"),
            *("kernel", "dtype", "kv_dtype", "weights", "page_size", "pages", "cuda_graphs"),
        )

    def labels(self, *values: str) -> tuple[str, ...]:
        """Label values of a family that has ``model_name`` first."""
        return (self._model, *values)

    def name_model(self, model: str) -> None:
        """Sets ``model_name`` for all that is measured from now on."""
        self._model = model

    def identify(self, ready: Ready, *, version: str, weights: str, max_batch_tokens: int) -> None:
        """Takes the description of a new engine; its totals begin at 0."""
        self._totals.begin(self._model)
        self._info.clear()
        options = ",".join(f"{key}={value}" for key, value in sorted(ready.attention_options.items()))
        identity = (version, self._model, ready.attention_backend, options)
        runs = (ready.attention_kernel, ready.dtype, ready.kv_dtype, weights, str(ready.page_size))
        counts = (str(ready.pages_total), str(ready.cuda_graphs))
        self._info.labels(*self.labels(*identity, *runs, *counts)).set(1)
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
            ).labels(*self.labels())
        # Present from the start, as rate() needs.
        self._durations.clear()
        self.prompt_tokens.labels(*self.labels())
        self.generation_tokens.labels(*self.labels())
        for reason in ("died", "hung", "not_ready"):
            self._restarts.labels(*self.labels(reason))
        sizes = {"total": ready.memory_total, "kv": ready.kv_bytes, "weights": ready.weight_bytes}
        for kind, size in sizes.items():
            self._memory.labels(*self.labels(kind)).set(size)
        for gauge in (self._bandwidth, self._matrix_rate):
            gauge.clear()
        if ready.measured is not None:
            self._bandwidth.labels(*self.labels()).set(ready.measured.bandwidth)
            self._matrix_rate.labels(*self.labels()).set(ready.measured.matrix_rate)
        self._load = Stats(
            pages_total=ready.pages_total, memory_used=ready.memory_used, threads=ready.threads
        )
        self._show_load()

    @property
    def load(self) -> Stats:
        """The engine's load after its last step."""
        return self._load

    def restarted(self, reason: str) -> None:
        """Counts that an engine is started in place of one that failed for this reason."""
        self._restarts.labels(*self.labels(reason)).inc()

    def engine_gone(self) -> None:
        """Sets the load to 0, since the engine is dead."""
        self._load = Stats()

    def step(self, output: StepOutput) -> None:
        """Takes one engine step."""
        stats = self._load = output.stats
        self._totals.step(stats)
        tokens = stats.prompt_tokens + stats.decode_tokens
        if tokens and self._step_tokens is not None:
            phase = "mixed" if stats.prompt_tokens and stats.decode_tokens else None
            phase = phase or ("prefill" if stats.prompt_tokens else "decode")
            if phase not in self._durations:
                self._durations[phase] = self._step_duration.labels(*self.labels(phase))
            self._durations[phase].observe(stats.step_seconds)
            self._step_tokens.observe(tokens)

    def _show_load(self) -> None:
        """Has the gauges of the load read when they are scraped, and not set by every step."""

        def show(gauge: Gauge, value: Callable[[Stats], float], *labels: str) -> None:
            gauge.labels(*self.labels(*labels)).set_function(lambda: value(self._load))

        self._step_age.labels(*self.labels()).set_function(lambda: self.step_age())
        show(self._running, lambda load: load.running)
        show(self._waiting, lambda load: load.waiting)
        show(self._threads, lambda load: load.threads)
        show(self._memory, lambda load: load.memory_used, "used")
        show(self._kv_usage, lambda load: load.pages_used / max(load.pages_total, 1))
        show(self._kv_pages, lambda load: load.pages_used, "used")
        show(self._kv_pages, lambda load: load.pages_cached, "cached")
        show(self._kv_pages, lambda load: load.pages_total - load.pages_used - load.pages_cached, "free")

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
        self.certificate_expiry = Gauge(
            "longspan_certificate_expiry_timestamp_seconds",
            "When the certificate in force expires, in seconds since 1970; without TLS no value.",
            ("role",),
            registry=registry,
        )
        self.seconds = Histogram(
            "longspan_grpc_server_handling_seconds",
            "Duration of calls.",
            (*method, "grpc_code"),
            buckets=_WHOLE_REQUEST,
            registry=registry,
        )
