"""A distillation: what it is asked for, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.measuring.types import Interval

Listener = Callable[[str, int, int], None]
"""Called with what is under way, in a few words, the step of training and how many there are; else 0."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a student is trained.

    Attributes:
        teacher: as ``longspan serve --model``; empty for the default model.
        text: files of the operator's own text.
        layers: of the student; 0 for an eighth of the teacher's.
        context: tokens of a block of text.
        batch: blocks of a step.
        steps: of training.
        learning_rate: its peak.
        schedule: of the learning rate after the warm-up.
        warmup: steps over which it rises from 0.
        temperature: divides both models' logits in the distillation loss.
        weight: of the distillation loss; the rest is the cross-entropy's.
        dropout: probability, in all places for which the architecture has one.
        weight_decay: of AdamW.
        seed: of the order of the text, and of dropout.
    """

    teacher: str
    text: tuple[str, ...]
    layers: int = 0
    context: int = 256
    batch: int = 2
    steps: int = 400
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    warmup: int = 20
    temperature: float = 2.0
    weight: float = 0.9
    dropout: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How often the teacher would accept the student's tokens in held-out text.

    Attributes:
        sampled: at temperature 1: the sum over the vocabulary of the smaller of both probabilities, mean over
            tokens (Leviathan et al. 2023, section 3.3).
        low: of its 95% interval over blocks of text.
        high: of its 95% interval.
        greedy: share of tokens with the same most likely next one.
        tokens: that were looked at.
    """

    sampled: float
    low: float
    high: float
    greedy: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the loss.

    Attributes:
        step: of training.
        loss: of distillation and cross-entropy together.
        held_out: on held-out text, not on the training's.
    """

    step: int
    loss: float
    held_out: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One server's answers.

    Attributes:
        name: what drafts.
        rate: output tokens per second of one request at a time, prompts included.
        drafted: tokens that were drafted.
        accepted: those of them that were right.
        per_step: tokens per step of a sequence, 1 without drafts.
        speed: how many times as fast as without a draft model: the median over prompts, each paired.
    """

    name: str
    rate: float
    drafted: int
    accepted: int
    per_step: float
    speed: Interval


@dataclass(frozen=True, slots=True)
class Served:
    """The pair as it is served, on this machine.

    Attributes:
        prompts: of held-out text, each asked of every server.
        prompt_tokens: of each.
        output_tokens: of each answer, greedy.
        rows: without a draft model, with the student before training, and with the student.
        different: prompts whose answers were not all the same.
    """

    prompts: int
    prompt_tokens: int
    output_tokens: int
    rows: tuple[Row, ...]
    different: int


@dataclass(frozen=True, slots=True)
class Distillation:
    """A student and what it is worth.

    Attributes:
        recipe: how it was trained; ``layers`` as they came to be.
        teacher: its name.
        student_weights: weights of the student.
        teacher_weights: weights of the teacher.
        before: acceptance of the layers as they were taken from the teacher.
        after: acceptance after training.
        losses: by step.
        seconds: of training, in this run.
        served: acceptance and speed of the pair as it is served; ``None`` where that was not measured.
        unserved: why the pair could not be served; empty if it could, or was not to be.
    """

    recipe: Recipe
    teacher: str
    student_weights: int
    teacher_weights: int
    before: Acceptance
    after: Acceptance
    losses: Sequence[Point]
    seconds: float
    served: Served | None = None
    unserved: str = ""
