"""The metrics: every row is there, and totals equal what clients were told."""

import asyncio
import re
import time
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from longspan.v1 import inference_pb2
from server.api.interceptor import Interceptor
from server.errors import RefusedError
from server.messages import Stats, StepOutput
from server.observe.metrics import counts_up_to
from server.observe.metrics_server import listen
from tests.api.conftest import always, ask, call_raw, until

ROWS = {
    *("requests", "request_rejections", "preemptions"),
    *("requests_running", "requests_waiting", "kv_cache_usage_ratio", "kv_pages", "engine_threads"),
    *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
    *("draft_tokens", "accepted_draft_tokens"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
    *("engine_step_duration_seconds", "engine_step_batch_tokens", "info"),
    *("engine_step_age_seconds", "engine_restarts"),
    *("attention_pages_read", "attention_pages_skipped", "engine_bytes", "engine_flops"),
    *("device_memory_bytes", "device_memory_bandwidth_bytes_per_second", "device_matrix_flops_per_second"),
    *("grpc_server_started", "grpc_server_handled", "grpc_server_msg_sent", "grpc_server_handling_seconds"),
}


async def test_every_row_is_there_and_none_is_about_creation(running):
    await running.generate()
    text = generate_latest(running.registry).decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {f"longspan_{row}" for row in ROWS} <= families
    assert "_created" not in text
    assert 'longspan_info{attention_backend="full",attention_options="window=8",cuda_graphs="0",' in text
    assert 'kernel="reference",kv_dtype="float16",' in text


async def test_the_documentation_names_every_row_and_no_other(running):
    await running.generate()
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    rows = re.findall(r"^\| [a-zA-Z ]+ \| (`[a-z].*) \|$", page.partition("## Metrics")[2], re.MULTILINE)
    named = set()
    for entry in re.findall("`([^`]+)`", " ".join(rows)):
        # Braces at the end are labels, before it they hold several names.
        name = re.sub(r"\{[^}]*\}$", "", entry)
        first, brace, rest = name.partition("{")
        inside, _, last = rest.partition("}")
        named |= (
            {f"longspan_{first}{part}{last}" for part in inside.split(",")} if brace else {f"longspan_{name}"}
        )
    text = generate_latest(running.registry).decode()
    families = text_string_to_metric_families(text)
    assert named == {f"{f.name}_total" if f.type == "counter" else f.name for f in families}


async def test_totals_equal_what_clients_were_told(running):
    running.engine.step_seconds = 0.001
    running.state.admission.limit = 100
    answers = await asyncio.gather(
        *(
            running.generate("x" * (i + 1), n=1 + i % 3, stop={"stop_strings": ["fgh"], "max_tokens": 3 + i})
            for i in range(20)
        )
    )
    usage = [answer.usage for answer in answers]
    completion = sum(u.completion_tokens for u in usage)
    samples = sum(len(answer.completions) for answer in answers)
    assert running.sample("longspan_generation_tokens_total") == completion
    assert running.sample("longspan_prompt_tokens_total") == sum(u.prompt_tokens for u in usage)
    assert running.sample("longspan_request_generation_tokens_sum") == completion
    assert running.sample("longspan_request_prompt_tokens_count") == 20
    assert running.sample("longspan_time_to_first_token_seconds_count") == 20
    assert running.sample("longspan_inter_token_latency_seconds_count") == completion - samples
    assert running.sample("longspan_request_time_per_output_token_seconds_count") == samples
    total = sum(answer.timings.total_seconds for answer in answers)
    assert running.sample("longspan_e2e_request_latency_seconds_sum") == pytest.approx(total)
    ended = [
        running.sample("longspan_requests_total", finish_reason=reason, grpc_code="OK")
        for reason in ("stop", "length")
    ]
    assert sum(ended) == 20
    assert all(ended)


async def test_tokens_of_cancelled_requests_are_counted_too(running):
    running.engine.step_seconds = 0.005
    request = inference_pb2.StreamGenerateRequest(request=ask(stop={"max_tokens": 190, "ignore_eos": True}))
    call = running.stub.StreamGenerate(request)
    seen = 0
    while seen < 5:
        seen += len((await call.read()).delta.token_ids)
    call.cancel()
    await until(lambda: len(running.state.admission) == 0)
    assert seen <= running.sample("longspan_generation_tokens_total") <= seen + 5
    assert running.sample("longspan_e2e_request_latency_seconds_count") == 0


async def test_latency_is_per_token_when_several_come_at_once(running):
    running.engine.step_seconds = 0.02
    running.engine.per_step = 4
    begun = time.monotonic()
    await running.generate(stop={"max_tokens": 9})
    took = time.monotonic() - begun
    assert running.sample("longspan_inter_token_latency_seconds_count") == 8
    # Two gaps of at least 20 ms, before tokens 5 to 8, and before token 9; each counted once.
    assert 0.04 <= running.sample("longspan_inter_token_latency_seconds_sum") < took


async def test_rejections_by_reason(running):
    await running.refused(ask(""))
    await running.refused(ask("x" * 300))
    await running.refused(ask(model="other"))
    running.state.phase = "draining"
    await running.refused(ask())
    for reason in ("invalid_argument", "prompt_too_long", "model_not_found", "draining"):
        assert running.sample("longspan_request_rejections_total", reason=reason) == 2
    refused = {"INVALID_ARGUMENT": 4, "NOT_FOUND": 2, "UNAVAILABLE": 2}
    for code, count in refused.items():
        assert running.sample("longspan_requests_total", finish_reason="none", grpc_code=code) == count


async def test_every_request_that_began_is_counted_when_it_ends(running, monkeypatch):
    """Also those that can't be parsed, and those that are cancelled before anything looks at them."""
    guard = Interceptor._guard
    reached = []

    @asynccontextmanager
    async def slow(self, *arguments):
        async with guard(self, *arguments) as call:
            await asyncio.sleep(0.05)
            reached.append(call)
            yield call

    monkeypatch.setattr(Interceptor, "_guard", slow)
    running.engine.step_seconds = 0.001
    running.state.admission.limit = 1000
    endless = ask(stop={"max_tokens": 190, "ignore_eos": True})

    async def one(i):
        if i % 2:
            call = running.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=endless))
        else:
            call = running.stub.Generate(endless)
        await asyncio.sleep(i / 200)
        call.cancel()

    for method in ("Generate", "StreamGenerate"):
        await call_raw(running, method, b"\xff\xff\xff")
    await asyncio.gather(*(one(i) for i in range(100)))
    await running.generate()

    def total(name):
        (family,) = (found for found in running.registry.collect() if found.name == name)
        methods = ("Generate", "StreamGenerate", None)
        return sum(sample.value for sample in family.samples if sample.labels.get("grpc_method") in methods)

    await until(lambda: total("longspan_grpc_server_started") == total("longspan_grpc_server_handled"))
    started = total("longspan_grpc_server_started")
    assert started > len(reached) > 3, "some ended before, some after"
    assert total("longspan_requests") == started
    assert running.sample("longspan_requests_total", finish_reason="none", grpc_code="INVALID_ARGUMENT") == 2
    assert running.sample("longspan_request_rejections_total", reason="malformed_request") == 2


async def test_grpc_metrics(running):
    events = await running.events(ask())
    labels = {
        "grpc_type": "server_stream",
        "grpc_service": "longspan.v1.InferenceService",
        "grpc_method": "StreamGenerate",
    }
    name = "longspan_grpc_server_"
    await until(lambda: running.sample(f"{name}handled_total", **labels, grpc_code="OK") == 1)
    assert running.sample(f"{name}started_total", **labels) == 1
    assert running.sample(f"{name}msg_sent_total", **labels) == len(events)
    assert running.sample(f"{name}handling_seconds_count", **labels, grpc_code="OK") == 1


async def test_the_engines_load_and_totals(running):
    def step(**stats):
        running.metrics.step(StepOutput(0.0, [], Stats(pages_total=100, step_seconds=0.01, **stats)))

    step(running=3, waiting=2, pages_used=40, pages_cached=10, preemptions=2, prompt_tokens=9)
    step(running=1, pages_used=20, preemptions=5, prefix_queries=7, prefix_hits=3, decode_tokens=1)
    step(prompt_tokens=1, decode_tokens=1, preemptions=5, prefix_queries=7, prefix_hits=3)
    assert running.sample("longspan_preemptions_total") == 5
    assert running.sample("longspan_prefix_cache_queries_total") == 7
    assert running.sample("longspan_prefix_cache_hits_total") == 3
    for phase in ("prefill", "decode", "mixed"):
        assert running.sample("longspan_engine_step_duration_seconds_count", phase=phase) == 1
    assert running.sample("longspan_engine_step_batch_tokens_sum") == 12
    assert running.sample("longspan_kv_pages", state="free") == 100
    running.metrics.engine_gone()
    assert running.sample("longspan_kv_pages", state="free") == 0
    # a new engine counts from 0 again; the totals go on
    running.metrics.identify(running.engine.ready, version="0", weights="float32", max_batch_tokens=64)
    step(preemptions=1)
    assert running.sample("longspan_preemptions_total") == 6


async def test_what_steps_cost_and_what_the_device_can_do(running):
    def step(**stats):
        running.metrics.step(StepOutput(0.0, [], Stats(step_seconds=0.01, **stats)))

    kinds = ("total", "used", "kv", "weights")
    assert [running.sample("longspan_device_memory_bytes", kind=kind) for kind in kinds] == [4, 3, 1, 2]
    assert running.sample("longspan_device_memory_bandwidth_bytes_per_second") == 1e12
    assert running.sample("longspan_device_matrix_flops_per_second") == 2e12
    # Figures of a step, not totals: a total of operations would outgrow 64 bits.
    step(decode_tokens=1, bytes_moved=7, flops=2**62, memory_used=9)
    step(decode_tokens=1, bytes_moved=5, flops=2**62, memory_used=8)
    assert running.sample("longspan_engine_bytes_total") == 12
    assert running.sample("longspan_engine_flops_total") == 2**63
    assert running.sample("longspan_device_memory_bytes", kind="used") == 8
    running.metrics.engine_gone()
    assert running.sample("longspan_device_memory_bytes", kind="used") == 0


async def test_a_device_that_was_not_measured_has_no_figures(running):
    unmeasured = msgspec.structs.replace(running.engine.ready, measured=None)
    running.metrics.identify(unmeasured, version="0", weights="float32", max_batch_tokens=64)
    for name in ("device_memory_bandwidth_bytes_per_second", "device_matrix_flops_per_second"):
        assert running.registry.get_sample_value(f"longspan_{name}", {"model_name": "fake"}) is None


def test_buckets_for_counts():
    assert counts_up_to(200) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert counts_up_to(8192)[-3:] == [2000, 5000, 8192]
    assert counts_up_to(1) == [1]


@pytest.mark.parametrize(
    "accept",
    ["application/openmetrics-text; version=abc", "text/plain;version=x.y"],
)
def test_a_client_with_an_odd_accept_header_gets_metrics_too(accept):
    registry = CollectorRegistry()
    Counter("longspan_odd", "x", registry=registry)
    server, port = listen(registry, "127.0.0.1", 0, always)
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=5) as response:
            assert response.status == 200
            assert b"longspan_odd_total 0.0" in response.read()
    finally:
        server.close()


def test_metrics_over_http_and_on_a_busy_port():
    server, port = listen(CollectorRegistry(), "127.0.0.1", 0, always)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            assert response.status == 200
        with pytest.raises(RefusedError, match="--metrics-port"):
            listen(CollectorRegistry(), "127.0.0.1", port, always)
    finally:
        server.close()
    again, same = listen(CollectorRegistry(), "127.0.0.1", port, always)
    assert same == port
    again.close()
