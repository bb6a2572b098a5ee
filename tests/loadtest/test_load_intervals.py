"""Intervals of load test figures from repeats and order statistics, and changes against an earlier one."""

import csv
import itertools
import json
import math
import random
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from loadtest import document
from loadtest.load import order_statistics, result, table
from loadtest.load.against import Finding, changes
from loadtest.load.document import save
from loadtest.load.measures import percentile, summarize
from loadtest.load.plots import throughput
from loadtest.load.request_rows import COLUMNS, save_csv
from loadtest.load.result import Result, Run
from loadtest.load.rows import clean, rows
from loadtest.load.types import Targets
from loadtest.measuring.records import Record
from loadtest.measuring.statistics import ratio_interval
from loadtest.measuring.types import Weather
from loadtest.report import labels
from tests.loadtest.test_figures import IDLE, shown

SHARES = [0.5, 0.9, 0.99]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [6, 29, 64, 299, 340, 500])
def test_intervals_of_percentiles_hold_the_true_one_as_often_as_they_promise(share, count):
    draws = random.Random(count)
    true = -math.log(1 - share)  # of an exponential distribution
    if order_statistics.ranks(count, share) is None:
        assert count < max(6, order_statistics.needed(share))
        return
    held = 0
    for _ in range(1000):
        low, high = order_statistics.interval(sorted(draws.expovariate(1) for _ in range(count)), share)
        held += low <= true <= high
    assert held >= 925, "95% promised; 25 fewer of 1,000 come once in ten thousand times"


def test_how_many_a_percentile_takes():
    assert [order_statistics.needed(share) for share in SHARES] == [5, 29, 299]
    assert order_statistics.ranks(298, 0.99) is None
    assert order_statistics.ranks(299, 0.99)[1] == 299
    assert order_statistics.ranks(0, 0.5) is None
    low, high = order_statistics.ranks(10_000, 0.5)
    assert 9_900 < low + high <= 10_100, "both tails are equal"
    assert 190 < high - low < 200, "twice 1.96 standard deviations of 50"


def records(count=16, ttft=0.1, noise=0.0, seed=0, cached=0):
    draws = random.Random(seed)
    found = []
    for index in range(count):
        first = index + ttft * math.exp(draws.gauss(0, noise))
        arrivals = [(first + 0.02 * token, 1) for token in range(5)]
        found.append(Record(index, 0, index, index, arrivals, arrivals[-1][0], 10, cached, expected_tokens=5))
    return found


def run(summary=None, *, users=2, requests=None, **fields):
    requests = records() if requests is None else requests
    return Run(
        load={"kind": "closed", "concurrency": users},
        workload={"name": "fixed", "prompt_tokens": 10, "output_tokens": 5, "fresh": True},
        warmup=0,
        interrupted=False,
        objections=[],
        summary=summarize(requests) if summary is None else summary,
        workers=IDLE,
        server=None,
        disagreements=[],
        requests=result.condense(requests),
        **fields,
    )


def made(runs, **fields):
    fields = {"seed": 1, "server": {"model": "m", "attention": {}}, **fields}
    return Result("2026-01-01T00:00:00+00:00", machine=document.machine(), versions={}, runs=runs, **fields)


def repeated(ttft, repeats=6, seed=0, **fields):
    return made(
        [
            run(requests=records(ttft=ttft, noise=0.05, seed=100 * seed + number), repeat=number)
            for number in range(repeats)
        ],
        **fields,
    )


def test_a_percentile_of_too_few_requests_is_marked():
    summary = summarize(records())
    assert summary.ttft.weak == ["p90", "p95", "p99"]
    assert list(summary.ttft.intervals) == ["p50"]
    assert summary.chunk_gap.intervals == {}, "gaps of one request depend on one another"
    (row,) = rows(made([run()]))
    assert row.cells["ttft_p99"].weak == "p99 of 16 requests is their largest; 299 or more can tell it"
    assert row.cells["ttft_p50"].weak == ""
    assert row.cells["ttft_p50"].interval.claimed
    assert not row.cells["output_rate"].interval.claimed
    text = shown(table.runs_table(made([run()])))
    assert "? p99 of 16 requests is their largest; 299 or more can tell it" in text
    assert "100? " in text
    many = summarize(records(320))
    assert many.ttft.weak == []
    assert "?" not in shown(table.runs_table(made([run(requests=records(320))])))


def test_repeats_of_a_load_are_one_row_with_intervals():
    found = repeated(0.1)
    found.runs.append(run(users=4))
    first, second = rows(found)
    assert (first.label, len(first.runs), len(second.runs)) == ("2 users, 10/5", 6, 1)
    cell = first.cells["ttft_p50"]
    assert cell.across_runs
    assert cell.interval.low < 0.1 < cell.interval.high
    assert cell.interval.low <= cell.interval.value <= cell.interval.high
    text = shown(table.runs_table(found))
    assert "figures: medians of 6 runs" in text
    few = shown(table.runs_table(repeated(0.1, repeats=3)))
    assert "too few for intervals; --repeats 6 has them" in few
    assert "%" not in few.replace("-%", "")


def test_a_terminal_of_80_columns_loses_no_digit():
    base, after = repeated(0.1), repeated(0.15, seed=1)
    wide, narrow = (shown(table.runs_table(base), width) for width in (200, 80))
    assert max(map(len, narrow.splitlines()[2:])) <= 80
    heads = [line.split() for line in narrow.splitlines() if line.startswith("load")]
    assert heads[0][-1] == "failed"
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow + shown(table.comparison(base, after), 80)
    assert narrow.split().count("0") == wide.split().count("0") > 0, "what failed is told in both"


def test_a_terminal_of_80_columns_shows_what_failed_however_wide_the_figures_are():
    wide = summarize(records(ttft=4000.0), Targets(ttft=1.0))
    wide = replace(wide, output_rate=12_345.6, prompt_rate=123_456.7, failed={"UNAVAILABLE": 3})
    text = shown(table.runs_table(made([run(wide, target="a-peer-with-a-name")])), 80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line for line in lines if line.startswith("load ")]
    assert len(heads) == 2, "what has no room beside goes below"
    assert heads[1].split()[-2:] == ["%", "failed"]
    after = lines[lines.index(heads[1]) :]
    assert next(line for line in after if line.startswith("2 users")).split()[-1] == "3"
    assert {"12,346", "123,457", "4,000,000?"} <= set(text.split())


def test_ratios_of_unpaired_medians_are_as_sure_as_they_say():
    draws = random.Random(1)

    def sample(count):
        return [math.exp(draws.gauss(0, 0.1)) for _ in range(count)]

    for counts in ((6, 6), (12, 8)):
        found = [ratio_interval([1.2 * v for v in sample(counts[0])], sample(counts[1])) for _ in range(100)]
        assert sum(each.low <= 1.2 <= each.high for each in found) >= 90, "95% promised"
        assert sum(each.excludes(1.0) for each in found) > 30, "a fifth more shows"
        assert {each.count for each in found} == {min(counts)}
    assert not ratio_interval(sample(5), sample(9)).claimed
    assert math.isnan(ratio_interval([], [1.0]).value)
    assert not ratio_interval([0.0] * 6, [1.0] * 6).claimed


def test_only_repeats_show_a_difference():
    base = repeated(0.1)
    for factor, finding in ((1.0, Finding.NONE), (1.5, Finding.WORSE), (0.7, Finding.BETTER)):
        found = {each.figure.key: each for each in changes(base, repeated(0.1 * factor, seed=1))}
        change = found["ttft_p50"]
        assert change.finding is finding
        assert change.across_runs
        assert change.ratio.value == pytest.approx(factor, rel=0.1)
        assert change.ratio.low < change.ratio.value < change.ratio.high
        assert found["tpot_p50"].finding is Finding.NONE, "equal figures"
    assert "(1.0" in shown(table.comparison(base, repeated(0.1, seed=1)))


def test_single_runs_are_compared_within_themselves_and_said_to_be():
    base, other = made([run(requests=records(noise=0.1))]), made([run(requests=records(ttft=0.3, noise=0.1))])
    found = {each.figure.key: each for each in changes(base, other)}
    assert found["ttft_p50"].finding is Finding.WORSE
    assert not found["ttft_p50"].across_runs
    assert found["output_rate"].finding is Finding.UNTESTED
    text = shown(table.comparison(base, other))
    lines = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert lines[lines.index("before") :][:3] == ["before", "after", "ratio"]
    assert "not tested from run to run" in text
    mixed = {each.figure.key: each for each in changes(base, repeated(0.3))}
    assert {each.finding for each in mixed.values()} == {Finding.UNTESTED}


def test_disturbed_runs_do_not_count_where_others_do():
    weather = Weather(foreign=0.5)
    spoilt = run(requests=records(ttft=5.0), disturbed="another used half", weather=weather)
    quiet = run(attempt=1)
    (row,) = rows(made([spoilt, quiet]))
    assert (row.runs, row.disturbed) == ([quiet], [spoilt])
    assert row.cells["ttft_p50"].interval.value == pytest.approx(0.1)
    assert clean(made([spoilt, quiet]))
    assert "1 of 2 runs were disturbed and don't count" in shown(table.runs_table(made([spoilt, quiet])))
    (row,) = rows(made([spoilt, replace(spoilt, attempt=1)]))
    assert len(row.runs) == 1, "attempts at one repeat are no repeats"
    assert not clean(made([spoilt]))
    assert "INVALID: every run was disturbed" in shown(table.runs_table(made([spoilt])))


def test_prompts_that_the_server_knew_are_a_warning():
    text = shown(table.runs_table(made([run(requests=records(cached=9), seed=7)])))
    assert "90% of the prompt tokens came from the prefix cache, though no two prompts" in text
    assert "an earlier run with seed 7; leave out --seed" in text
    shared = run(requests=records(cached=9))
    shared.workload = {**shared.workload, "fresh": False}
    assert "though" not in shown(table.runs_table(made([shared])))


def test_a_document_keeps_it_all(tmp_path):
    file = tmp_path / "r.json"
    found = repeated(0.1, peers={"peer": {"endpoint": "http://a/v1"}}, notes=["a note"])
    found.runs.append(run(target="peer", weather=Weather(foreign=math.nan), disturbed="x", seed=3))
    save(found, file)
    again = result.load(file)
    assert repr(again) == repr(found)
    figures = {(each["label"], each["figure"]): each for each in json.loads(file.read_text())["figures"]}
    cell = figures["2 users, 10/5", "ttft_p99"]
    assert cell["weak"].startswith("p99 of 16 requests")
    assert cell["across_runs"]
    assert cell["low"] < cell["value"] < cell["high"]
    assert figures["2 users, 10/5, peer", "output_rate"]["low"] is None
    assert "a note" in shown(table.runs_table(again))


def test_documents_of_the_schema_before_are_read_and_said_to_be(tmp_path):
    file = tmp_path / "old.json"
    save(made([run()]), file)
    old = json.loads(file.read_text())
    old["schema"] = "longspan-load/1"
    for name in ("figures", "peers", "confidence", "notes"):
        del old[name]
    for each in old["runs"]:
        for name in ("target", "repeat", "seed", "weather", "attempt", "disturbed"):
            del each[name]
        for name in ("other_length", "told_tokens"):
            del each["summary"][name]
        for spread in each["summary"].values():
            if isinstance(spread, dict) and "p50" in spread:
                del spread["weak"], spread["intervals"]
        for request in each["requests"]:
            del request["cached_tokens"], request["expected_tokens"], request["error"]
    file.write_text(json.dumps(old))
    found = result.load(file)
    assert found.runs[0].summary.ttft.weak == ["p90", "p95", "p99"]
    text = shown(table.runs_table(found))
    assert "old.json is of schema longspan-load/1" in text
    assert "(1.00)" not in shown(table.comparison(found, found)), "nothing can be tested"
    save_csv(found, tmp_path / "old.csv")


def test_every_request_is_a_row_of_csv(tmp_path):
    failed = Record(16, 0, 16.0, 16.5, [], 17.0, code="UNAVAILABLE", error='gone, "really"')
    found = made([run(requests=[*records(), failed], target="peer", repeat=2, seed=9)])
    save_csv(found, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 17
    assert tuple(lines[0]) == COLUMNS
    first, last = lines[0], lines[-1]
    assert (first["label"], first["target"], first["repeat"], first["seed"]) == (
        *("2 users, 10/5, peer", "peer"),
        *("2", "9"),
    )
    assert (float(first["ttft"]), float(first["tpot"]), float(first["latency"])) == pytest.approx(
        (0.1, 0.02, 0.18)
    )
    assert (last["ttft"], last["code"], last["error"]) == ("", "UNAVAILABLE", 'gone, "really"')


def test_names_of_loads_are_not_drawn_over_each_other(tmp_path):
    def point(users, rate, latency):
        found = summarize(records())
        return run(replace(found, output_rate=rate, latency=replace(found.latency, p50=latency)), users=users)

    places = [(1, 270.0, 0.5), (2, 272.0, 0.52), (4, 300.0, 0.6), (8, 825.0, 1.2), (16, 830.0, 1.3)]
    found = rows(made([point(*place) for place in places]))
    throughput(found, found).write(tmp_path / "plot.svg")
    boxes = []
    for text in ElementTree.parse(tmp_path / "plot.svg").iter("{http://www.w3.org/2000/svg}text"):
        if re.fullmatch(r"\d+ users?", text.text or ""):
            x, y, wide = float(text.get("x")), float(text.get("y")), 6.0 * len(text.text)
            left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
            boxes.append(labels.Box(left, y - 10, left + wide, y))
    assert len(boxes) == 5
    assert all(one.shared(other) == 0 for one, other in itertools.combinations(boxes, 2))


def test_percentile_and_interval_agree():
    ordered = sorted(random.Random(0).random() for _ in range(400))
    for share in SHARES:
        low, high = order_statistics.interval(ordered, share)
        assert low <= percentile(ordered, share) <= high
