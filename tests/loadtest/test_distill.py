"""A draft model from a teacher's own layers, trained on text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtest import texts
from loadtest.cli import distill as command
from loadtest.direct.distill import run
from loadtest.direct.distill.acceptance import acceptance, best_speedup
from loadtest.direct.distill.report import served_sentences
from loadtest.direct.distill.run import distill, measure_served
from loadtest.direct.distill.served import AFTER, ALONE, BEFORE
from loadtest.direct.distill.student import make_student
from loadtest.direct.distill.train import distillation_loss
from loadtest.direct.distill.types import Acceptance, Distillation, Recipe, Row, Served
from loadtest.measuring.types import Interval
from tests.command import longspan
from tests.models_zoo import save_tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill") / "teacher"
    save_tiny("llama", folder, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    text = tmp_path_factory.mktemp("text") / "manual.txt"
    text.write_text(texts.reference()[:12_000])
    return Recipe(str(teacher), (str(text),), layers=2, context=32, batch=4, steps=20, warmup=2)


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distillation]:
    """A student and how it came to be, by a run without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "student"
    return folder, distill(recipe, folder, None, quiet)


def stops_at(step: int) -> Callable[[str, int, int], None]:
    def listener(stage: str, done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return listener


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_the_loss_is_the_papers() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 5, 7)) * 3
    ids = rng.integers(7, size=(2, 5))
    ours, theirs = softmax(student / 2), softmax(teacher / 2)
    soft = (theirs * np.log(theirs / ours)).sum(-1).mean() * 4
    chosen = np.take_along_axis(softmax(student)[:, :-1], ids[:, 1:, None], -1)
    expected = 0.7 * soft + 0.3 * -np.log(chosen).mean()
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(ids), 2.0, 0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_acceptance_is_the_overlap_of_both_distributions(teacher: Path) -> None:
    one = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    other = make_student(one, 2)
    held_out = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    same = acceptance(one, one, held_out)
    assert (same.sampled, same.greedy) == (pytest.approx(1.0, abs=1e-5), 1.0)
    with torch.no_grad():
        ours, theirs = (softmax(model(held_out).logits.double().numpy()) for model in (other, one))
    found = acceptance(one, other, held_out)
    assert found.sampled == pytest.approx(np.minimum(ours, theirs).sum(-1).mean(), abs=1e-5)
    assert found.greedy == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean())
    assert found.low < found.sampled < found.high
    assert found.tokens == 96


def test_speedup_is_what_a_simulation_finds() -> None:
    rng = np.random.default_rng(0)
    rate, cost = 0.7, 0.1
    factor, drafted = best_speedup(rate, cost)
    accepted = (rng.random((100_000, drafted)) < rate).cumprod(1).sum(1)
    assert factor == pytest.approx((accepted.mean() + 1) / (drafted * cost + 1), rel=0.01)
    assert best_speedup(0.0, 0.5) == (pytest.approx(1 / 1.5), 1)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_student_is_made_of_the_teachers_layers(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path / kind)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
    layers = teacher.config.num_hidden_layers
    student = make_student(teacher, 1)
    theirs = dict(teacher.named_parameters())
    for name, weight in student.named_parameters():
        assert torch.equal(weight, theirs[name])  # the only layer is the first
    assert student.config.num_hidden_layers == 1
    with pytest.raises(ValueError, match=f"the teacher has {layers}; give 1 to {layers - 1}"):
        make_student(teacher, layers)


def test_a_student_keeps_the_vocabulary_and_is_a_folder_of_its_own(
    recipe: Recipe, finished: tuple[Path, Distillation]
) -> None:
    folder, found = finished
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher, dtype=torch.float32).eval()
    assert student.config.num_hidden_layers == 2
    assert student.config.attention_dropout == teacher.config.attention_dropout
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert not torch.equal(
        student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight
    )
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, recipe.teacher)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert found.after.sampled > found.before.sampled
    report = json.loads((folder / "distillation.json").read_text())
    assert report["after"]["sampled"] == found.after.sampled
    ids = tokenizers[1](Path(recipe.text[0]).read_text(), add_special_tokens=False)["input_ids"]
    whole = torch.tensor(ids[: len(ids) // 32 * 32]).reshape(-1, 32)
    held_out = whole[len(whole) - round(len(whole) / 10) :][:24]
    assert acceptance(teacher, student, held_out).sampled == pytest.approx(found.after.sampled, abs=1e-5)
    assert [point.step for point in found.losses if point.held_out] == sorted(
        {point.step for point in found.losses if point.held_out}
    )
    assert "held out" in (folder / "loss.svg").read_text()
    with pytest.raises(ValueError, match="has a finished student"):
        distill(recipe, folder, None, quiet)


def test_an_interrupted_run_continues_to_the_same_student(
    recipe: Recipe, finished: tuple[Path, Distillation], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "parts", None, stops_at(11))
    with pytest.raises(ValueError, match="has a run with other options"):
        distill(replace(recipe, steps=21), tmp_path / "parts", None, quiet)
    half_written = tmp_path / "parts/checkpoints/checkpoint-12"  # as a kill leaves it
    half_written.mkdir()
    (half_written / "config.json").write_text("{}")
    steps: list[int] = []
    found = distill(recipe, tmp_path / "parts", None, lambda stage, done, total: steps.append(done))
    assert min(step for step in steps if step) == 9  # after the checkpoint of step 8
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (finished[0], tmp_path / "parts")
    )
    assert all(torch.allclose(weight, other[name], atol=1e-6) for name, weight in one.items())
    assert {point.step for point in found.losses} >= {1, 8, 20}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"text": ("none.txt",)}, "No such file or directory: 'none.txt'"),
        ({"layers": 4}, "the teacher has 4; give 1 to 3"),
        ({"context": 4096}, "blocks of 4096 tokens; give at least 20"),
        ({"teacher": "nothing/at/all"}, "nothing/at/all"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(
    recipe: Recipe, tmp_path: Path, changed: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((OSError, ValueError), match=sentence):
        distill(replace(recipe, **changed), tmp_path / "out", None, quiet)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_does_not_generate_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the teacher is a BertForMaskedLM, and no decoder"):
        distill(replace(recipe, teacher=str(folder)), tmp_path / "out", None, quiet)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), OSError),
        (RuntimeError("PytorchStreamWriter failed writing file data/0\nmore"), OSError),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
def test_a_full_disk_is_told_as_one(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[Exception]
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "train", fails)
    with pytest.raises(told, match=str(error).partition("\n")[0].replace("(", ".").replace(")", ".")):
        distill(recipe, tmp_path / "out", None, quiet)


def test_a_folder_with_something_else_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        distill(recipe, tmp_path, None, quiet)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--schedule", "linear"], "--schedule linear: choose cosine or inverse_sqrt"),
        (["--warmup", "400"], "--warmup 400 leaves none of 400 --steps; give fewer"),
    ],
)
def test_the_command_refuses_before_anything_is_loaded(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    done = longspan("distill", "--text", "a", "--out", str(tmp_path), *options)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"longspan: {sentence}\n")


@pytest.mark.parametrize(("teacher", "model"), [("", ""), ("my model", "--model 'my model' ")])
def test_the_command_tells_how_to_serve_the_student(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], teacher: str, model: str
) -> None:
    seen = Acceptance(0.5, 0.4, 0.6, 0.5, 100)
    monkeypatch.setattr(
        "loadtest.direct.distill.run.distill",
        lambda recipe, *_: Distillation(recipe, "teacher", 1, 8, seen, seen, [], 1.0),
    )
    monkeypatch.setattr(command, "signals_raise", lambda: None)
    command.distill([Path("a")], Path("student"), teacher=teacher, measure=False)
    told = capsys.readouterr().out.splitlines()
    assert told[-1].strip() == f"longspan serve {model}--speculate draft --draft-model student"


SEEN = Acceptance(0.5, 0.4, 0.6, 0.5, 100)


def served(speed: Interval, drafted: int = 100, different: int = 0) -> Distillation:
    rows = (
        Row(ALONE, 40.0, 0, 0, 1.0, Interval(1.0, 1.0, 1.0, 12)),
        Row(BEFORE, 39.0, 0, 0, 1.0, Interval(0.97, 0.95, 0.99, 12)),
        Row(AFTER, 40.0 * speed.value, drafted, drafted // 2, 1.25, speed),
    )
    found = Served(12, 128, 64, rows, different)
    return Distillation(Recipe("", ()), "teacher", 1, 8, SEEN, SEEN, [], 1.0, found)


@pytest.mark.parametrize(
    ("speed", "verdict"),
    [
        (
            Interval(1.2, 1.1, 1.3, 12),
            "speculation pays on this machine: 1.20 times as fast (1.10 to 1.30) as without a draft model",
        ),
        (
            Interval(0.9, 0.85, 0.95, 12),
            "speculation does not pay on this machine: 0.90 times as fast (0.85 to 0.95) as without a draft "
            "model; serve the teacher alone",
        ),
        (
            Interval(1.1, 0.95, 1.3, 12),
            "speculation does not surely pay on this machine: 1.10 times as fast (0.95 to 1.30) as without a "
            "draft model",
        ),
        (
            Interval(1.3, count=3),
            "speculation: 1.30 times as fast as without a draft model, of too few prompts to tell whether it "
            "pays; give more --text",
        ),
    ],
)
def test_the_verdict_on_speculation_is_what_the_interval_says(speed: Interval, verdict: str) -> None:
    told = served_sentences(served(speed))
    assert told[-1] == verdict
    assert told[1:3] == [
        "  without a draft model: 40.0 tokens/s",
        "  student before training: 39.0 tokens/s; nothing was drafted, since by the measured times no draft "
        "would have paid",
    ]
    assert "50% of 100 drafts accepted, 1.25 tokens per step" in told[3]


def test_a_pair_that_is_not_served_says_why() -> None:
    found = replace(served(Interval(1.0)), served=None, unserved="speculation needs a CPU")
    assert served_sentences(found) == [
        "the pair could not be served here, so its speed is not known: speculation needs a CPU"
    ]
    assert served_sentences(replace(found, unserved="")) == []


@pytest.mark.stress  # three servers
@pytest.mark.timeout(300)
def test_the_pair_is_measured_as_it_is_served(recipe: Recipe, tmp_path: Path) -> None:
    found = measure_served(distill(recipe, tmp_path, None, quiet), tmp_path, None, quiet)
    assert not found.unserved
    assert found.served is not None
    assert [row.name for row in found.served.rows] == [ALONE, BEFORE, AFTER]
    alone, before, after = found.served.rows
    assert (alone.drafted, alone.accepted, alone.per_step, alone.speed.value) == (0, 0, 1.0, 1.0)
    assert all(row.rate > 0 and row.speed.claimed for row in found.served.rows)
    assert before.drafted + after.drafted > 0, "each is tried at least"
    assert json.loads((tmp_path / "distillation.json").read_text())["served"]["prompts"] == 12
