"""From records to figures, verdicts, documents and tables."""

import io
import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loadtest import document
from loadtest.load import reconcile, result, table, validity
from loadtest.load.document import save
from loadtest.load.measures import percentile, spread, summarize
from loadtest.load.report import render
from loadtest.load.result import Result, Run
from loadtest.load.types import Targets, Worker
from loadtest.measuring.records import Record

IDLE = [Worker(cpu_share=0.1, loop_lag=0.001)]


def record(sent=0.0, first=0.1, gap=0.05, tokens=5, late=0.0, **fields):
    arrivals = [(sent + first + gap * index, 1) for index in range(tokens)]
    fields = {"ended": (arrivals[-1][0] if arrivals else sent) + 0.01, "expected_tokens": tokens, **fields}
    return Record(0, 0, sent - late, sent, arrivals, prompt_tokens=7, **fields)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.01, 1))
def test_percentile_is_the_nearest_rank(values, share):
    found = percentile(sorted(values), share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < share * len(values)


def test_figures_of_known_records():
    summary = summarize([record(0.0, 0.1, 0.05), record(1.0, 0.3, 0.1)])
    assert summary.ttft.p50 == pytest.approx(0.1)
    assert summary.ttft.most == pytest.approx(0.3)
    assert summary.tpot.mean == pytest.approx(0.075)
    assert summary.chunk_gap.count == 8
    assert summary.wall == pytest.approx(1.71)
    assert summary.output_rate == pytest.approx(10 / 1.71)
    assert summary.concurrency == pytest.approx((0.31 + 0.71) / 1.71)
    assert summary.goodput is None


def test_a_single_token_has_no_tpot_and_tokens_that_come_together_share_the_time():
    assert record(tokens=1).tpot is None
    burst = Record(0, 0, 0.0, 0.0, [(1.0, 3), (2.0, 2)], 2.0)
    assert burst.tokens == 5
    assert burst.tpot == pytest.approx(0.25)
    assert burst.gaps == [1.0]


def test_failures_count_against_goodput_and_give_no_times():
    failed = record(first=9.0, code="UNAVAILABLE", error="gone")
    short = record(first=9.0, error="got 3 tokens instead of 5")
    late = record(late=2.0)
    summary = summarize([record(), failed, short, late], Targets(ttft=1.0))
    assert summary.goodput == 0.25
    assert summary.failed == {"UNAVAILABLE": 1, "WRONG_LENGTH": 1}
    assert summary.ttft.most == pytest.approx(0.1)
    assert summary.ttft_intended.most == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("targets", "good"), [((0.2, None, None), 1), ((None, 0.04, None), 0), ((None, None, 0.1), 0)]
)
def test_every_target_counts(targets, good):
    assert summarize([record()], Targets(*targets)).goodput == good


def test_a_run_is_valid_only_if_its_client_kept_up():
    assert validity.objections([record() for _ in range(100)], IDLE) == []
    (late,) = validity.objections([record(late=0.02) for _ in range(100)], IDLE)
    assert "20 ms or more after their time" in late
    busy, slow = validity.objections([record()], [*IDLE, Worker(0.97, 0.2)])
    assert "busy 97% of the time" in busy
    assert "200 ms late" in slow
    assert validity.objections([], IDLE) == ["no request was sent"]


METRICS = """# HELP longspan_requests_total x
longspan_requests_total{finish_reason="stop",grpc_code="OK",model_name="a b"} %d
longspan_requests_total{finish_reason="length",grpc_code="OK",model_name="a b"} 1.0
longspan_prompt_tokens_total{model_name="a b"} %d
longspan_generation_tokens_total{model_name="a b"} %d
longspan_time_to_first_token_seconds_sum{model_name="a b"} %f
longspan_time_to_first_token_seconds_count{model_name="a b"} %d
"""


def samples(tmp_path, *values):
    page = tmp_path / "metrics"
    page.write_text(METRICS % values)
    return reconcile.scrape(page.as_uri())


def test_client_and_server_are_compared(tmp_path):
    before, after = samples(tmp_path, 5, 10, 20, 1.0, 4), samples(tmp_path, 7, 24, 30, 1.2, 6)
    server = reconcile.server_side(before, after)
    assert (server.requests, server.prompt_tokens, server.output_tokens) == (2, 14, 10)
    assert server.ttft == pytest.approx(0.1)
    assert math.isnan(server.queue_time)
    summary = summarize([record(), record()])
    assert reconcile.disagreements(summary, server) == []
    more = reconcile.server_side(before, samples(tmp_path, 8, 31, 35, 3.0, 7))
    sentences = reconcile.disagreements(summary, more)
    assert [sentence.partition(":")[0] for sentence in sentences] == [
        *("requests", "prompt tokens", "output tokens"),
        "mean time to first token",
    ]
    assert "the client counted 10, the server 15" in sentences[2]


def test_a_page_without_metrics_is_refused(tmp_path):
    page = tmp_path / "page"
    page.write_text("go_gc_duration_seconds 1\n")
    with pytest.raises(reconcile.ScrapeError, match="shows no metrics of Longspan"):
        reconcile.scrape(page.as_uri())
    with pytest.raises(reconcile.ScrapeError, match="can't be read"):
        reconcile.scrape((tmp_path / "none").as_uri())


def make_result(*rates, seed=0):
    runs = []
    for users, rate in enumerate(rates, start=1):
        records = [record(sent=index / rate) for index in range(10)]
        records.append(record(tokens=0, ended=2.0, code="UNAVAILABLE", error="no"))
        runs.append(
            Run(
                load={"kind": "closed", "concurrency": users},
                workload={"name": "fixed", "prompt_tokens": 7},
                warmup=1,
                interrupted=False,
                objections=["the client sent late"] if users == 2 else [],
                summary=summarize(records, Targets(ttft=1.0)),
                workers=IDLE,
                server=None,
                disagreements=[],
                requests=result.condense(records),
            )
        )
    return Result(
        created="2026-01-01T00:00:00+00:00",
        seed=seed,
        machine=document.machine(),
        versions={"longspan": "1"},
        server={
            "model": "<b>tiny</b>",
            "dtype": "float32",
            "kv_dtype": "float16",
            "device": "cpu",
            "attention": {"backend": "full"},
        },
        runs=runs,
    )


def test_a_document_comes_back_as_it_was(tmp_path):
    file = tmp_path / "result.json"
    before = make_result(1.0, 2.0)
    save(before, file)
    after = result.load(file)
    assert json.dumps(asdict(after), default=str) == json.dumps(asdict(before), default=str)
    assert json.loads(file.read_text())["schema"] == "longspan-load/2"
    assert after.runs[1].load_label == "2 users"


def test_a_figure_that_is_no_number_is_null(tmp_path):
    file = tmp_path / "result.json"
    odd = make_result(1.0)
    odd.runs[0].summary = summarize([record(tokens=1)])
    save(odd, file)
    assert json.loads(file.read_text())["runs"][0]["summary"]["tpot"]["p50"] is None
    assert math.isnan(result.load(file).runs[0].summary.tpot.p50)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "other"}', '{"schema": "longspan-load/1"}'])
def test_other_files_are_refused(tmp_path, text):
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(document.DocumentError, match=r"result\.json"):
        result.load(file)


def test_time_per_output_token_is_of_all_tokens_but_the_first():
    assert Record(0, 0, 0.0, 0.5, [(1.0, 1), (2.0, 1), (3.0, 1)]).tpot == 1.0
    # Tokens that come together share a time, those of the first message too.
    assert Record(0, 0, 0.0, 0.5, [(1.0, 3), (2.0, 1), (3.0, 1)]).tpot == 0.5
    assert Record(0, 0, 0.0, 0.5, [(1.0, 5)]).tpot is None
    assert Record(0, 0, 0.0, 0.5, [(1.0, 1)]).tpot is None
    assert Record(0, 0, 0.0, 0.5).tpot is None


def shown(renderable, width=200):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_a_table_shows_remarks_and_failures():
    text = shown(table.runs_table(make_result(1.0, 2.0)))
    assert "2 users *" in text
    assert "2 users: INVALID: the client sent late" in text
    assert "failed: 1 UNAVAILABLE" in text


def test_two_results_are_compared_run_by_run():
    before, after = make_result(1.0, 2.0), make_result(2.0, seed=5)
    after.server["kv_dtype"] = "float32"
    text = shown(table.comparison(before, after))
    ratio = after.runs[0].summary.output_rate / before.runs[0].summary.output_rate
    assert f"~{ratio:.2f}" in text
    assert "only in one of the two: 2 users" in text
    assert "seed" not in text
    assert "kv_dtype: float16 before, float32 after" in text


def test_the_report_is_one_file_and_escapes_texts_of_servers():
    text = render(make_result(1.0, 2.0, 3.0))
    assert text.count("<figure") == 2 + 2 + 3
    assert "<b>tiny</b>" not in text
    assert "&lt;b&gt;tiny&lt;/b&gt;" in text
    assert "src=" not in text
    assert 'href="http' not in text
    assert "the client sent late" in text


def test_spread_of_nothing():
    assert spread([]).count == 0
    assert math.isnan(spread([None]).p99)
