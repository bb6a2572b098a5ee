"""The page docs/models.md says what is so: a few of its rows in every run, all of them in ``make stress``."""

from __future__ import annotations

import json
import os
import time

import pytest
import transformers

from tests.survey import serving, table, workers
from tests.survey.architectures import Case, cases, config_of
from tests.survey.build import build
from tests.survey.oracle import Oracle
from tests.survey.outcome import Outcome, Verdict
from tests.survey.rows import attempt, entries
from tests.survey.table import Row
from tests.survey.thresholds import thresholds
from tests.survey.try_one import try_case, try_folder

# One of each way in which a model can differ: RoPE by length, windows by layer, latent attention, experts,
# learned sinks, absolute positions, a state, an encoder.
FEW = (
    "llama, longrope RoPE",
    "gemma3_text",
    "deepseek_v3, yarn RoPE",
    "gpt_oss",
    "gpt2",
    "mamba",
    "bert, as an encoder",
    "an unknown tensor",
)


def difference(name: str, outcome: Outcome) -> str:
    """What is wrong with an outcome, by itself or beside the page."""
    if outcome.verdict in table.BUGS:
        return f"{outcome.verdict}, {outcome.detail}"
    row = table.read(entries()[name].section).get(name)
    return table.differs(row and row.outcome, outcome)


@pytest.mark.parametrize("name", FEW)
def test_a_row_is_as_the_page_says(name, tmp_path):
    assert not difference(name, attempt(name, tmp_path))


def test_the_page_has_every_row_and_no_bug():
    rows = {name: row for section in table.SECTIONS for name, row in table.read(section).items()}
    assert list(rows) == list(entries())
    assert not [row for row in rows.values() if row.outcome.verdict in table.BUGS]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}),
        ("mistral", {"sliding_window": 56}),
        ("gemma2", {"attn_logit_softcapping": 30.0}),
    ],
)
def test_another_answer_is_called_wrong(kind, change, tmp_path, monkeypatch):
    """The model that is compared with is another one than the one that is served."""
    served, other = tmp_path / "served", tmp_path / "other"
    model = build(config_of(Case(kind)))
    model.save_pretrained(served)
    model.save_pretrained(other)
    file = other / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    load = Oracle.load
    monkeypatch.setattr(Oracle, "load", lambda folder, *args: load(other, *args))
    monkeypatch.setattr(serving, "_LENGTHS", (17,))  # and one beyond what was changed
    assert try_folder(served).verdict is Verdict.WRONG


def test_a_text_that_is_too_short_for_a_threshold_is_not_called_exact(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.survey.try_one.prompts_beyond", lambda threshold: [[9, 10, 11]])
    outcome = try_case(Case("mistral"), tmp_path)
    assert outcome == Outcome(Verdict.NOT_TRIED, "15 tokens are not beyond sliding_window 48")


def test_thresholds_are_found_wherever_a_config_has_them():
    config = transformers.AutoConfig.for_model(
        "gemma3",
        text_config={
            "sliding_window": 12,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 2.0,
                    "original_max_position_embeddings": 48,
                },
            },
        },
    )
    assert thresholds(config) == {"original_max_position_embeddings": 48, "sliding_window": 12}
    config = config_of(next(case for case in cases() if case.name == "llama, dynamic RoPE"))
    assert thresholds(config) == {"max_position_embeddings": 64}


def _die(name, there):
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    there.send(Outcome(Verdict.EXACT))


def test_a_model_that_dies_or_hangs_is_a_row():
    found = {}
    workers.run(
        ["dies", "hangs", "works"],
        tell=lambda name, outcome: found.update({name: outcome}),
        work=_die,
        seconds=2,
    )
    assert found == {
        "dies": Outcome(Verdict.CRASHED, "the process ended with 3"),
        "hangs": Outcome(Verdict.CRASHED, "no end after 2 s"),
        "works": Outcome(Verdict.EXACT),
    }


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    page = tmp_path / "models.md"
    page.write_text(table.FILE.read_text())
    monkeypatch.setattr(table, "FILE", page)
    rows = [
        Row("a", "A", Outcome(Verdict.REFUSED, "is a | b, by 0.5")),
        Row("b, c", "B", Outcome(Verdict.EXACT)),
    ]
    table.write(table.VARIANTS, rows, {"torch": "9"})
    assert list(table.read(table.VARIANTS).values()) == rows
    assert "2 rows, made with torch 9: 1 exact, 1 refused." in page.read_text()
    recorded = rows[0].outcome
    assert not table.differs(recorded, Outcome(Verdict.REFUSED, "is a | b, by 1.7e-05"))
    assert table.differs(recorded, Outcome(Verdict.REFUSED, "is a | c, by 0.5"))
    assert table.differs(recorded, Outcome(Verdict.EXACT, recorded.detail))
    assert table.differs(None, recorded)


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_every_row_is_as_the_page_says():
    found = {}
    workers.run(entries(), tell=lambda name, outcome: found.update({name: difference(name, outcome)}))
    assert set(found) == set(entries())
    wrong = [f"{name}: {said}" for name, said in found.items() if said]
    assert not wrong, "\n".join(wrong)
