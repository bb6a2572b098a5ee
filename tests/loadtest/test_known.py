"""Presets, and the known figures of the default model checked against rows."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from loadtest.compare import document, holding
from loadtest.compare.holding import Held
from loadtest.compare.known import EXPECTED, MANY, SINGLE, Expectation, Figure
from loadtest.compare.plan import Asked, PlanError, budget, make_plan
from loadtest.compare.presets import BARE, KNOWN, PRESETS, QUICK, SELECTION, SINKS, WHOLE
from loadtest.compare.types import Comparison
from loadtest.deployment import FULL
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.types import Measurement
from tests.command import longspan

BLOCKS, ROUNDS, NEEDLES = 8, 7, 10
NATS = {SINKS.name: 0.04, BARE.name: 0.5, SELECTION.name: 0.03}


def as_known():
    """A comparison in which everything is as it should be."""
    plan, _ = make_plan(Asked(preset=KNOWN))
    found = Comparison(plan, "2026-11-29T12:00:00+00:00", {"cpu": "abacus", "cores": 2})
    for one in plan.candidates:
        name = one.name
        near = one.attention == "sliding_window"
        for length in plan.contexts:
            sees = int(one.options.get("window", length))
            for block in range(BLOCKS):
                logprobs = tuple([-2.7 - NATS.get(name, 0.0)] * 16)
                found.text.append(TextBlock(name, length, block, length // 2, logprobs))
            for place in range(NEEDLES):
                depth = (place + 0.5) / NEEDLES
                lost = 2.2 if (1 - depth) * length > sees else 0.0
                found.answers.append(
                    Answer(
                        *(name, MANY, length, 0, place, depth, ("1",), "1"),
                        float(not lost),
                        -7 * (0.3 + lost),
                        7,
                    )
                )
            found.answers.append(Answer(name, SINGLE, length, 0, 0, 0.5, ("1",), "1", 1.0, -2.0, 7))
            held = min(length, sees + 32) if near else length
            found.memory.append(Memory(name, length, held * 22_500.0, 10))
        for load in plan.loads:
            for number in range(ROUNDS):
                tpot = 0.004 + (0.0 if near else load.context * 4e-7) + number * 1e-6
                found.speed.append(
                    Measurement(name, load.label, number, 0, 0, 0.0, 1.0, {"tpot": tpot, "output_rate": 250})
                )
    return found


def test_a_comparison_in_which_all_is_as_known():
    findings = holding.hold(as_known())
    assert [finding.expectation for finding in findings] == list(EXPECTED)
    assert {finding.held for finding in findings} == {Held.YES}
    assert not holding.has_failed(findings)


def expectation(name, figure, length, depths=(0.0, 1.0), task=SINGLE):
    wanted = (name, figure, length, depths, task)
    (found,) = [
        each
        for each in EXPECTED
        if (each.deployment, each.figure, each.length, each.depths, each.task) == wanted
    ]
    return found


def held(comparison, *place):
    (finding,) = holding.hold(comparison, [expectation(*place)])
    return finding


def changed(rows, name, length, **values):
    return [replace(row, **values) if (row.deployment, row.length) == (name, length) else row for row in rows]


@pytest.mark.parametrize(
    ("name", "nats", "passed"),
    [
        (SINKS.name, 0.13, True),
        (SINKS.name, 0.15, False),
        (SINKS.name, -0.05, False),
        (BARE.name, 0.4, True),
        (BARE.name, 0.2, False),
        (SELECTION.name, 0.11, False),
    ],
)
def test_perplexity(name, nats, passed):
    found = as_known()
    found.text = changed(found.text, name, 4096, logprobs=tuple([-2.7 - nats] * 16))
    finding = held(found, name, Figure.PERPLEXITY, 4096)
    assert finding.measured.value == pytest.approx(math.exp(nats))
    assert (finding.held is Held.YES) is passed
    assert holding.has_failed([finding]) is not passed


def test_needles_by_depth():
    found = as_known()
    inside, outside = (0.6, 1.0), (0.0, 0.4)
    assert held(found, SINKS.name, Figure.LOGPROB, 1024, inside).measured.value == pytest.approx(0.0)
    assert held(found, SINKS.name, Figure.LOGPROB, 1024, outside).measured.value == pytest.approx(2.2)
    found.answers = [
        replace(row, logprob=-7 * 0.8) if row.deployment == SINKS.name and row.task == MANY else row
        for row in found.answers
    ]
    for depths in (inside, outside):
        finding = held(found, SINKS.name, Figure.LOGPROB, 1024, depths)
        assert finding.measured.value == pytest.approx(0.5)
        assert finding.held is Held.NO


def test_a_window_that_finds_evicted_needles():
    found = as_known()
    outside = (SINKS.name, Figure.FOUND, 4096, (0.0, 0.8), MANY)
    assert held(found, *outside).measured.value == 0.0
    found.answers = [replace(row, score=1.0) for row in found.answers]
    finding = held(found, *outside)
    assert (finding.measured.value, finding.measured.count, finding.held) == (1.0, 8, Held.NO)


def test_the_pass_key_is_found():
    found = as_known()
    lost = [replace(row, index=1, score=0.0) for row in found.answers if row.task == SINGLE]
    found.answers += lost
    finding = held(found, FULL.name, Figure.FOUND, 4096)
    assert (finding.measured.value, finding.measured.count, finding.held) == (0.5, 2, Held.NO)


def test_memory_that_grows_under_a_window():
    found = as_known()
    found.memory = changed(found.memory, SINKS.name, 4096, bytes=4096 * 22_500.0)
    assert held(found, SINKS.name, Figure.MEMORY, 4096).held is Held.NO
    assert held(found, FULL.name, Figure.MEMORY, 4096).held is Held.YES


def test_time_per_token_fails_only_where_its_interval_is_beyond_the_bound():
    found = as_known()
    found.speed = [
        replace(row, figures={"tpot": 0.004 * (1 + 0.5 * (row.load.startswith("4k")))}) for row in found.speed
    ]
    finding = held(found, SINKS.name, Figure.TPOT, 4096)
    assert (finding.held, finding.measured.value) == (Held.NO, pytest.approx(1.5))
    found.speed = [
        replace(row, figures={"tpot": row.figures["tpot"] * (0.6 if row.round in (1, 2, 3) else 1.0)})
        for row in found.speed
    ]
    assert held(found, SINKS.name, Figure.TPOT, 4096).held is Held.YES


@pytest.mark.parametrize(
    ("busy", "rounds", "note"), [("a sentence", 9, "the machine is too busy"), ("", 3, "too few rounds")]
)
def test_times_that_tell_nothing_are_no_failure(busy, rounds, note):
    found = as_known()
    found.busy = busy
    found.speed = [row for row in found.speed if row.round < rounds]
    findings = holding.hold(found)
    untold = [finding for finding in findings if finding.held is Held.UNTOLD]
    assert {finding.expectation.figure for finding in untold} == {Figure.TPOT}
    assert all(finding.note.startswith(note) for finding in untold)
    assert not holding.has_failed(findings)


@pytest.mark.parametrize("error", ["", "the prompt is too long"])
def test_a_missing_figure_fails_and_says_why(error):
    found = as_known()
    found.text = [replace(row, error=error) for row in found.text] if error else found.text[:0]
    found.answers, found.memory = [], []
    findings = holding.hold(found)
    missing = [finding for finding in findings if finding.held is Held.NO]
    assert [finding.expectation for finding in missing] == [
        each for each in EXPECTED if each.figure is not Figure.TPOT
    ]
    assert {finding.note for finding in missing} == {error or "the time did not suffice; give more --budget"}


def test_the_table_tells_figures_that_are_not_as_known():
    other = Expectation("nothing", Figure.TPOT, 4096, "it is so", most=2.0)
    found = as_known()
    found.memory = changed(found.memory, SINKS.name, 4096, bytes=4096 * 22_500.0)
    findings = holding.hold(found, [*EXPECTED, other])
    assert findings[-1].note == "it is not a candidate of this comparison"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(holding.table(findings))
    lines = console.export_text().splitlines()
    failed = [line for line in lines if " FAIL" in line]
    assert len(failed) == 2
    assert "0.95 to 1.05" in failed[0]
    assert "7.59" in failed[0]
    assert sum(" as known" in line for line in lines) == len(EXPECTED) - 1
    assert "it is known because pages outside the window are freed" in " ".join("\n".join(lines).split())


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_decides_unset_options(preset):
    asked = Asked(preset=preset)
    plan, material = make_plan(asked)
    assert (plan.candidates, plan.contexts, plan.tasks) == (preset.candidates, preset.contexts, preset.tasks)
    assert plan.candidates[0] == FULL
    assert budget(asked, None) == preset.seconds
    assert budget(asked, "90") == 90
    assert material.chat is preset.chat
    assert {load.context for load in plan.loads} == set(preset.contexts)
    assert any(not load.cached for load in plan.loads) is preset.prefill
    assert preset is PRESETS[preset.name]


def test_expectations_can_be_measured():
    for each in EXPECTED:
        assert each.deployment in {one.name for one in KNOWN.candidates}
        assert {each.length, each.shorter or each.length} <= set(KNOWN.contexts)
        assert each.least < each.most
    assert {SINGLE, MANY} == set(KNOWN.tasks)


def test_options_go_before_the_preset():
    plan, _ = make_plan(Asked(preset=WHOLE, contexts=[2048], tasks=["needles"], concurrency=[8]))
    assert (plan.contexts, plan.tasks, plan.candidates) == ((2048,), ("needles",), WHOLE.candidates)
    assert [load.concurrency for load in plan.loads] == [8]
    assert make_plan(Asked())[0].candidates == QUICK.candidates


@pytest.mark.parametrize(
    ("option", "value"),
    [("contexts", [2048]), ("candidates", ["sliding_window"]), ("tasks", ["vt"]), ("concurrency", [2])],
)
def test_a_fixed_preset_can_not_be_changed(option, value):
    with pytest.raises(PlanError, match=f"leave out --{option.removesuffix('s')}, or take another preset"):
        make_plan(Asked(preset=KNOWN, **{option: value}))


@pytest.mark.parametrize("bytes_", [540 * 22_500.0, 4096 * 22_500.0])
def test_the_command_ends_with_1_where_a_figure_is_not_as_known(tmp_path, bytes_):
    found = as_known()
    found.memory = changed(found.memory, SINKS.name, 4096, bytes=bytes_)
    document.save(found, tmp_path / "known.json")
    done = longspan("compare", "--preset", "known", "--show", str(tmp_path / "known.json"))
    assert done.returncode == int(bytes_ > 600 * 22_500.0), done.stderr
    assert ("FAIL" in done.stdout) is (done.returncode == 1)
    assert "What is known of the default model" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "fast"], "there is no preset 'fast'; choose from quick, full, known"),
        (["--preset", "known", "--full"], "give one of them"),
        (["--preset", "known", "--context", "2048"], "leave out --context"),
    ],
)
def test_presets_that_make_no_sense_are_refused(arguments, sentence):
    done = longspan("compare", *arguments)
    assert done.returncode == 2
    assert sentence in " ".join(done.stderr.split())
