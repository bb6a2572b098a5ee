"""The comparison: its verdict, its document, its report, and the whole of it on a tiny model."""

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.compare import document
from loadtest.compare.candidates import QUICK, WHOLE, candidate, parse
from loadtest.compare.measure import NO_CONTEXT, same_tokens
from loadtest.compare.report import write_report
from loadtest.compare.table import table
from loadtest.compare.types import Comparison, Plan, key
from loadtest.compare.verdict import judge, recommendation
from server.cli import application
from tests.models_zoo import save_tiny

FULL, WINDOW, TOPK = QUICK
PLAN = Plan(
    candidates=QUICK,
    contexts=(1024, 4096),
    text="a text",
    text_hash="0",
    depths=(0.1, 0.98),
    keys_per_depth=2,
    slices=1,
    output_tokens=8,
    prompts=(),
    arguments=(),
)


def make(**changes):
    """Full attention at 1; ``changes`` give a candidate's own figures at 4096, by its name's first word."""
    comparison = Comparison(PLAN, "2026-01-01T00:00:00+00:00", {"cores": 2, "cpu": "abacus"})
    for one in PLAN.candidates:
        for context in PLAN.contexts:
            figures = {"tpot": 0.1, "perplexity": 10.0, "kv_bytes": 2.0**24, "deep": 2, "prefill_rate": 100.0}
            if context == 4096:
                figures |= changes.get(one.name.split()[0].replace("-", ""), {})
            speed = {"prefill_rate": figures["prefill_rate"], "ttft": 1.0, "tpot": figures["tpot"]}
            hidden = {"0.1": 2, "0.98": 2}
            cells = {
                "speed": speed,
                "memory": {"kv_bytes": figures["kv_bytes"], "fits": 3},
                "perplexity": {"perplexity": figures["perplexity"]},
                "needles": {"found": {"0.1": figures["deep"], "0.98": 2}, "hidden": hidden},
            }
            for measurement, cell in cells.items():
                comparison.cells[key(one.name, context, measurement)] = cell
    return comparison


def test_what_is_faster_and_loses_nothing_is_recommended():
    comparison = make(
        topk={"tpot": 0.05, "perplexity": 10.2}, window={"tpot": 0.02, "kv_bytes": 2.0**20, "deep": 0}
    )
    first, second = recommendation(comparison)
    assert first.startswith("Deploy top-k 512: at 4k it is 2.0 times faster per token, and nothing was lost")
    assert "perplexity +2.0% at 4k" in first
    assert second.startswith(
        "If your use can bear it, window 1020 + 4 sinks is 5.0 times faster per token, 16.0 times"
    )
    assert "loses every needle at depth 0.1 of 4k" in second


def test_what_is_not_faster_is_not_worth_a_change():
    (only,) = recommendation(make(topk={"tpot": 0.097}))
    assert only.startswith("Deploy full: no other variant was faster without losing")


@pytest.mark.parametrize(
    ("changes", "safe"),
    [
        ({}, True),
        ({"perplexity": 10.4}, True),
        ({"perplexity": 10.6}, False),
        ({"deep": 1}, False),
        ({"perplexity": 9.0}, True),
    ],
)
def test_safe_means_no_needle_lost_and_little_perplexity(changes, safe):
    judgment = next(j for j in judge(make(window={"tpot": 0.05, **changes})) if j.candidate == WINDOW.name)
    assert judgment.safe == safe


def test_a_loss_in_part_is_counted():
    judgment = judge(make(window={"deep": 1}))[0]
    assert "loses 1 needles at depth 0.1 of 4k" in judgment.losses


def test_what_could_not_be_measured_is_not_safe():
    comparison = make(topk={"tpot": 0.01})
    comparison.cells[key(TOPK.name, 1024, "needles")] = {"error": "it fell over"}
    judgment = judge(comparison)[1]
    assert not judgment.safe
    assert any("it fell over" in loss for loss in judgment.losses)
    del comparison.cells[key(TOPK.name, 1024, "needles")]
    assert not judge(comparison)[1].safe


def test_without_full_attention_there_is_no_recommendation():
    comparison = make()
    comparison.cells[key(FULL.name, 4096, "speed")] = {"error": "too long"}
    assert recommendation(comparison) == ["There is no recommendation: full has no figures at 4k."]


def test_an_exact_backend_is_safe_whatever_the_noise_of_its_figures():
    flash = parse("flash")
    assert flash.exact
    assert not parse("sliding_window window=9").exact


def test_answers_to_the_users_prompts():
    assert same_tokens([1, 2, 3], [1, 2, 4, 5]) == 0.5
    assert same_tokens([], []) == 1.0
    comparison = make()
    for one, last in ((FULL, 3), (WINDOW, 3), (TOPK, 4)):
        answers = [{"tokens": [1, 2, last], "text": "x"}, {"tokens": [1], "text": "y"}]
        comparison.cells[key(one.name, NO_CONTEXT, "answers")] = {"answers": answers}
    window, topk = judge(comparison)
    assert "2 of 2 of your prompts answered word for word as by full attention" in window.losses
    assert "1 of 2 of your prompts answered word for word as by full attention" in topk.losses


def test_candidates_from_words():
    assert parse("sparse pattern=topk dense_layers=0,1").predicting.options["prefill"] == "sparse"
    explicit = parse("sparse pattern=topk prefill=sparse")
    assert explicit.predicting == explicit.deployment
    assert candidate(WINDOW.deployment).predicting == WINDOW.deployment
    for wrong in ("", "window=3", "full 3"):
        with pytest.raises(ValueError, match="is no candidate"):
            parse(wrong)
    assert len({one.name for one in WHOLE}) == len(WHOLE)


def test_a_document_comes_back_and_goes_on(tmp_path):
    file = tmp_path / "c.json"
    comparison = make(window={"tpot": math.nan})
    comparison.cells[key(TOPK.name, 4096, "speed")] = {"error": "it fell over"}
    document.save(comparison, file)
    again = document.go_on_with(make(), file)
    assert again.plan == comparison.plan
    assert key(TOPK.name, 4096, "speed") not in again.cells, "what failed is measured again"
    assert len(again.cells) == len(comparison.cells) - 1
    assert json.loads(file.read_text())["recommendation"] == recommendation(comparison)
    other = replace(PLAN, contexts=(512,))
    with pytest.raises(document.DocumentError, match="other candidates, contexts, text or settings"):
        document.go_on_with(Comparison(other, "", {}), file)
    file.write_text("{}")
    with pytest.raises(document.DocumentError, match="is no result of longspan compare"):
        document.load(file)


def test_table_and_report_show_figures_losses_and_errors(tmp_path):
    comparison = make(window={"tpot": 0.02, "deep": 0}, topk={"perplexity": 10.7})
    comparison.model = {"name": "<tiny>", "dtype": "float32", "kv_dtype": "float16", "device": "cpu"}
    comparison.cells[key(TOPK.name, 1024, "memory")] = {"error": "no room"}
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(table(comparison))
    text = console.export_text()
    assert "<tiny>, float32, KV float16, cpu" in text
    assert "10.7 (+7.0%)" in text
    assert "2 of 4" in text
    assert "! top-k 512, memory: no room" in text
    write_report(comparison, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 2
    assert "&lt;tiny&gt;" in page
    assert "<tiny>" not in page
    assert "no room" in page


@pytest.mark.timeout(280)
def test_the_command_on_a_tiny_model(tmp_path, tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("compare") / "llama", max_position_embeddings=2048)
    file, page = tmp_path / "c.json", tmp_path / "c.html"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\nwhat is it\n")
    command = ["compare", "--model", str(folder), "--context", "512", "--prompts", str(prompts)]
    command += ["--candidate", "sliding_window window=60", "--candidate", "sparse pattern=nonsense"]
    command += ["--json", str(file), "--html", str(page), "--", "--threads", "1", "--kv-memory", "64MiB"]
    # Only the first of the four servers has to import transformers.
    command += ["--weights", "int8", "--cache-dir", str(tmp_path)]
    done = CliRunner().invoke(application, command)
    assert done.exit_code == 0, done.output
    found = document.load(file)
    full, window, wrong = (found.row(one.name, 512) for one in found.plan.candidates)
    for row in (full, window):
        assert row.prefill_rate > 0
        assert row.tpot > 0
        assert row.perplexity > 1
        assert row.hidden == {0.1: 1, 0.5: 1, 0.98: 1}
        assert not row.errors
    assert window.kv_bytes < full.kv_bytes / 3
    assert window.fits > 3 * full.fits
    assert found.cell("full", NO_CONTEXT, "answers")
    assert all("has no pattern 'nonsense'" in error for error in wrong.errors)
    assert "<svg" in page.read_text()
    # Nothing is left to do but what failed.
    again = CliRunner().invoke(application, command)
    assert "full: starting" not in again.stderr
    assert "pattern=nonsense: starting" in again.stderr
