"""A comparison of attention variants: plan, measurements and judgment."""

from __future__ import annotations

import enum
import shlex
from dataclasses import dataclass, field
from typing import Any

from loadtest.compare.turns import Turns
from loadtest.deployment import Deployment
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.types import Interval, Load, Measurement


@dataclass(frozen=True, slots=True)
class Margins:
    """How much worse than full attention a variant may be and still be called safe.

    Attributes:
        perplexity: of the text, as a share: 0.05 allows 1.05 times full's. Quantization to 4 bits, which is
            deployed routinely, costs about as much.
        score: of the tasks, in points of 1: 0.05 allows 5 of 100 answers fewer.
        logprob: of right answers, nats per token, where a task's answers fail under full attention too.
        agreement: share of greedy tokens of the user's prompts that may differ from full's.
        effective: share of full's score at the shortest context that a variant has to keep for a length to
            count as effective (RULER takes a fixed score of 85.6; here full is the measure).
        speed: a gain below this share is not worth a change, however certain.
    """

    perplexity: float = 0.05
    score: float = 0.05
    logprob: float = 0.1
    agreement: float = 0.1
    effective: float = 0.85
    speed: float = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a comparison. Two runs of one plan on one model can be joined.

    Attributes:
        candidates: the first is full attention, which the others are compared with.
        contexts: lengths in tokens, ascending.
        loads: of the cells; the first of each context is the operator's own.
        tasks: names of ``loadtest.tasks``.
        text: where the text came from: a file's name, or words.
        text_hash: of its content.
        own: where the user's own questions came from; empty for none.
        own_hash: of their content.
        chat: questions are asked through the model's chat template.
        margins: of the verdict.
        confidence: of every interval and test, 0 to 1.
        seed: of all that is drawn.
        kv_memory: bytes of KV cache that ``fits`` is counted for; the same for all.
        arguments: of ``longspan serve``, for every server.
        tasks_version: of what the tasks ask, ``loadtest.tasks.registry.VERSION``; 1 in files from before it.
        beyond: lengths in tokens, ascending, that the model's context does not hold: only readings are asked.
    """

    candidates: tuple[Deployment, ...]
    contexts: tuple[int, ...]
    loads: tuple[Load, ...]
    tasks: tuple[str, ...]
    text: str
    text_hash: str
    own: str = ""
    own_hash: str = ""
    chat: bool = False
    margins: Margins = field(default_factory=Margins)
    confidence: float = 0.95
    seed: int = 0
    kv_memory: int = 0
    arguments: tuple[str, ...] = ()
    tasks_version: int = 1
    beyond: tuple[int, ...] = ()

    @property
    def full(self) -> str:
        """Name of full attention, which the others are compared with."""
        return self.candidates[0].name

    def candidate(self, name: str) -> Deployment:
        """The candidate of a name."""
        return next(one for one in self.candidates if one.name == name)

    @property
    def served(self) -> tuple[Deployment, ...]:
        """The candidates with a server of their own: all attention variants."""
        return tuple(one for one in self.candidates if not one.is_reading)

    @property
    def readings(self) -> tuple[Deployment, ...]:
        """The candidates that read documents through full attention's server."""
        return tuple(one for one in self.candidates if one.is_reading)

    @property
    def kinds(self) -> int:
        """Kinds of units of one number: at each length the tasks, and two more where attention is asked."""
        return len(self.contexts) * (len(self.tasks) + 2) + len(self.beyond) * len(self.tasks)

    def lengths(self, name: str) -> tuple[int, ...]:
        """All lengths that a candidate can be asked at, ascending."""
        return (*self.contexts, *self.beyond) if self.candidate(name).is_reading else self.contexts

    def command(self, name: str) -> str:
        """The command that serves a candidate as it was measured, with the model and all arguments.

        Of a reading it is the one that reads, from a server of full attention.
        """
        if self.candidate(name).is_reading:
            return self.candidate(name).command
        return shlex.join(["longspan", "serve", *self.arguments, *self.candidate(name).arguments])


@dataclass(slots=True)
class Comparison:
    """A comparison, complete or under way.

    Attributes:
        plan: what is measured.
        created: UTC, ISO 8601.
        machine: what it runs on.
        versions: of Longspan and what it runs on.
        model: name, architecture, parameters, dtype, kv_dtype, device, context_length, vocabulary_size.
        running: how each candidate is served, by name: ``kernel``, ``reason``, ``options``.
        budget: seconds that it was given.
        spent: seconds that it has used, over all runs that were joined.
        speed: cells, in the order in which they were measured.
        answers: of tasks and of the user's own questions.
        text: blocks of text.
        memory: KV cache.
        failed: candidates that failed while they were measured, by name: why.
        busy: why this machine is too busy to tell speeds apart, a sentence; empty if it is not.
    """

    plan: Plan
    created: str
    machine: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    running: dict[str, dict[str, Any]] = field(default_factory=dict)
    budget: float = 0.0
    spent: float = 0.0
    speed: list[Measurement] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    text: list[TextBlock] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    busy: str = ""


class Outcome(enum.StrEnum):
    """The outcome of a test of non-inferiority."""

    SAFE = "safe"
    UNSAFE = "not safe"
    UNKNOWN = "not enough evidence"


@dataclass(frozen=True, slots=True)
class Evidence:
    """One test: how much worse than full attention a variant is in one respect, and whether that is too much.

    Attributes:
        deployment: the variant.
        measure: ``text``, ``tasks`` (together: by ``score`` those that full attention can do, by ``logprob``
            those that it fails), ``task:NAME``, ``own``.
        length: context length; 0 where it does not depend on one.
        unit: of ``loss`` and ``margin``: ``perplexity`` (a ratio less 1), ``score``, ``logprob`` (nats per
            token), ``agreement``.
        loss: of the variant against full, paired; more is worse.
        margin: the most that is allowed.
        full: full's own value, for context.
        own: the variant's.
        outcome: of the test.
        more: samples that would probably settle it, beyond those that there are; ``None`` if it is settled.
        decides: it is part of the verdict; else it only tells where something was lost.
        where: in words where it loses, like "at depth 0.1 and 0.3: 0 of 8 found where full finds 8".
        note: why it can't tell, or what to know of it; empty for nothing.
        contexts: that the samples of ``loss`` come from; samples of one context depend on one another.
        turns: losses of the first and of the later questions about a context; ``None`` where it has only one.
    """

    deployment: str
    measure: str
    length: int
    unit: str
    loss: Interval
    margin: float
    full: float
    own: float
    outcome: Outcome
    more: int | None = None
    decides: bool = True
    where: str = ""
    note: str = ""
    contexts: int = 0
    turns: Turns | None = None


@dataclass(frozen=True, slots=True)
class Gain:
    """One figure of speed or memory against full attention's.

    Attributes:
        deployment: the variant.
        load: label of the load.
        context: tokens.
        figure: ``ttft``, ``tpot``, ``output_rate``, ``bytes``, ``fits``; ``memory_rate``: tokens per second
            of several users, for each GiB of KV cache that their sequences hold at this context.
        full: full's own.
        own: the variant's.
        ratio: how many times better than full, paired by round; below 1 is worse.
        equal_work: the variant computes here what full computes: any difference is the machine's noise.
    """

    deployment: str
    load: str
    context: int
    figure: str
    full: Interval
    own: Interval
    ratio: Interval
    equal_work: bool = False

    @property
    def different(self) -> bool:
        """The interval excludes no difference, and the work is not the same."""
        return self.ratio.excludes(1.0) and not self.equal_work


@dataclass(frozen=True, slots=True)
class Likeness:
    """How far a variant's next-token distributions are from full attention's, on the same tokens of the text.

    Attributes:
        length: context length.
        kl: KL divergence from full's distributions, nats per token; a lower bound, see ``TextBlock``.
        same_top: share of places where the most likely token is full's.
    """

    length: int
    kl: Interval
    same_top: Interval


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one variant.

    Attributes:
        deployment: its name.
        outcome: safe only if every deciding test is.
        evidence: all tests of it.
        gains: all its figures of speed and memory.
        effective: longest context at which it keeps the margin's share of full's score at its shortest; 0 for
            none, ``None`` where no task is informative or answers are missing.
        exact: it computes full attention.
        sentence: what it brings and costs, a line.
        command: what to type to deploy it.
        likeness: by length, where the text was decoded; it tells how a variant differs and decides nothing.
        effective_least: what ``effective`` surely is, at the plan's confidence for each length by itself.
        effective_most: what it may be, likewise.
    """

    deployment: str
    outcome: Outcome
    evidence: tuple[Evidence, ...]
    gains: tuple[Gain, ...]
    effective: int | None
    exact: bool
    sentence: str
    command: str
    likeness: tuple[Likeness, ...] = ()
    effective_least: int | None = None
    effective_most: int | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """The recommendation.

    Attributes:
        winner: name of the deployment; empty where nothing can be said.
        sentences: why, and what is known of the others; they name load, lengths, text and confidence.
        command: what to type; empty without a winner.
        quality_speed: names on the Pareto front of quality against the speed of the operator's load at the
            longest context, every server with as much KV memory.
        quality_memory: names on that of quality against KV bytes of a sequence: of the same memory, as many
            times more sequences fit as these are fewer.
    """

    winner: str
    sentences: tuple[str, ...]
    command: str
    quality_speed: tuple[str, ...] = ()
    quality_memory: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgment:
    """A whole comparison, judged.

    Attributes:
        verdicts: of every candidate but full, in the plan's order.
        advice: what to deploy.
        uninformative: tasks and lengths where full itself fails, or all see the whole context, in words.
    """

    verdicts: tuple[Verdict, ...]
    advice: Advice
    uninformative: tuple[str, ...] = ()


EXACT = ("full", "flash", "xformers")
"""Backends that compute full attention."""
