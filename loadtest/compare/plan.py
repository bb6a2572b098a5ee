"""From the operator's request to a plan; requests that can't be measured are refused."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from loadtest import arguments, texts
from loadtest.compare.presets import QUICK, Preset
from loadtest.compare.stopping import LEAST_CONFIDENCE, MOST_CONFIDENCE
from loadtest.compare.types import Margins, Plan
from loadtest.deployment import FULL, Deployment, parse
from loadtest.measuring.types import Load
from loadtest.tasks import own as own_questions
from loadtest.tasks.registry import TASKS, VERSION
from loadtest.tasks.types import Sample

LEAST_CONTEXT = 256

_OUTPUT_TOKENS = 32
_OWN_TEXT = "the manual that comes with Python"
_OWN_ARGUMENTS = {
    "--attention": "name the variant as a --candidate",
    "--attention-option": "give options with a --candidate, like 'sliding_window window=512'",
    "--port": "each takes a free port",
    "--metrics-port": "each takes a free port",
    "--model": "give --model once, before --",
}


Tell = Callable[[str], None]
"""Called with the current activity, in a few words."""


class PlanError(ValueError):
    """Something asked for can't be measured; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The operator's request; ``None`` and empty where the preset decides.

    Attributes:
        preset: gives what is not asked for.
        model: as for ``longspan serve``.
        contexts: lengths in tokens.
        candidates: beside full attention, in words.
        tasks: names.
        concurrency: numbers of users.
        rate: sessions per second instead of users.
        text: file of the operator's own text.
        questions: file of the operator's own questions.
        chat: ask through the chat template; ``None``: as the preset does.
        margins: changed ones, by name.
        confidence: of all intervals and tests.
        seed: of all that is drawn.
        arguments: of ``longspan serve``.
    """

    preset: Preset = QUICK
    model: str | None = None
    contexts: Sequence[int] = ()
    candidates: Sequence[str] = ()
    tasks: Sequence[str] = ()
    concurrency: Sequence[int] = ()
    rate: float | None = None
    text: Path | None = None
    questions: Path | None = None
    chat: bool | None = None
    margins: Sequence[str] = ()
    confidence: float = 0.95
    seed: int = 0
    arguments: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Material:
    """Texts and questions to measure on, beside the plan, which keeps only their hashes.

    Attributes:
        text: that is decoded.
        prose: running text in which tasks hide what they ask for.
        own: the operator's own questions.
        chat: what was asked for; see ``Asked``.
        units: see ``Preset``.
    """

    text: str
    prose: str
    own: tuple[Sample, ...]
    chat: bool | None
    units: int = 1


def make_plan(asked: Asked) -> tuple[Plan, Material]:
    """The plan and what it is measured on; ``preflight`` checks what only a server knows.

    Raises:
        PlanError: something can't be measured.
    """
    _keep_fixed(asked)
    _keep_own(asked)
    contexts = tuple(sorted(set(asked.contexts))) or asked.preset.contexts
    if contexts[0] < LEAST_CONTEXT:
        raise PlanError(f"a context of {contexts[0]} tokens is too short; give {LEAST_CONTEXT} or more")
    try:
        prose = texts.prose(texts.reference())
        text = prose if asked.text is None else texts.read(asked.text)
        own = tuple(own_questions.read(asked.questions)) if asked.questions else ()
        own_hash = _hash(asked.questions.read_text(encoding="utf-8")) if asked.questions else ""
    except OSError as error:
        raise PlanError(f"{error.filename} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(str(error)) from error
    _check_confidence(asked.confidence)
    plan = Plan(
        candidates=_candidates(asked),
        contexts=contexts,
        loads=tuple(load for context in contexts for load in _loads(asked, context)),
        tasks=_tasks(asked),
        text=_OWN_TEXT if asked.text is None else str(asked.text),
        text_hash=_hash(text),
        own=str(asked.questions or ""),
        own_hash=own_hash,
        margins=_margins(asked.margins, Margins()),
        confidence=asked.confidence,
        seed=asked.seed,
        arguments=(*(("--model", asked.model) if asked.model else ()), *asked.arguments),
        tasks_version=VERSION,
    )
    chat = asked.preset.chat if asked.chat is None else asked.chat
    return plan, Material(text, prose, own, chat, asked.preset.units)


def rejudged(plan: Plan, margins: Sequence[str], confidence: float | None) -> Plan:
    """The plan of a finished comparison, to be judged with other margins or at another confidence.

    Args:
        plan: as it was measured.
        margins: changes to its own, in words.
        confidence: of all intervals and tests; ``None`` keeps its own.

    Raises:
        PlanError: they can't be read.
    """
    if confidence is not None:
        _check_confidence(confidence)
        plan = replace(plan, confidence=confidence)
    return replace(plan, margins=_margins(margins, plan.margins))


def _check_confidence(confidence: float) -> None:
    if not LEAST_CONFIDENCE <= confidence <= MOST_CONFIDENCE:
        raise PlanError(
            f"--confidence {confidence:g} is beyond what the rule for when to stop measuring was tried for; "
            f"give {LEAST_CONFIDENCE:g} to {MOST_CONFIDENCE:g}, like 0.95"
        )


def budget(asked: Asked, words: str | None) -> float:
    """Seconds from words like ``5m``, ``1h30m``, ``90``; the preset's own without them.

    Raises:
        PlanError: they say no duration.
    """
    try:
        return asked.preset.seconds if words is None else arguments.budget(words)
    except argparse.ArgumentTypeError as error:
        raise PlanError(f"--budget {error}") from error


def _keep_fixed(asked: Asked) -> None:
    if not asked.preset.fixed:
        return
    chosen = {
        "--candidate": asked.candidates,
        "--context": asked.contexts,
        "--task": asked.tasks,
        "--concurrency": asked.concurrency,
        "--rate": asked.rate,
        "--chat": asked.chat,
        "--questions": asked.questions,
    }
    if given := [option for option, value in chosen.items() if value not in (None, (), [])]:
        raise PlanError(
            f"--preset {asked.preset.name} is checked against figures of its own candidates, contexts, tasks "
            f"and load; leave out {' and '.join(given)}, or take another preset"
        )


def _keep_own(asked: Asked) -> None:
    """Refuses server arguments that the comparison sets itself: they would be lost, or clash."""
    given = [word.partition("=")[0] for word in asked.arguments]
    for option, instead in _OWN_ARGUMENTS.items():
        if option in given and (option != "--model" or asked.model is not None):
            raise PlanError(f"{option} after -- would be the same for all servers; {instead}")


def _candidates(asked: Asked) -> tuple[Deployment, ...]:
    try:
        chosen = [parse(words) for words in asked.candidates]
    except ValueError as error:
        raise PlanError(str(error)) from error
    if not chosen:
        return asked.preset.candidates
    others = [deployment for deployment in chosen if deployment.arguments != FULL.arguments]
    if not others:
        raise PlanError("full attention is compared with nothing; name another --candidate")
    # Candidates are equal if their options are, however they are written.
    same = [(each.attention, dict(each.options), each.others) for each in others]
    if twice := {each.name for each, what in zip(others, same, strict=True) if same.count(what) > 1}:
        raise PlanError(f"{', '.join(sorted(twice))} is a candidate twice; name each once")
    return (FULL, *others)


def _loads(asked: Asked, context: int) -> list[Load]:
    """The operator's first. One user's decoding is measured apart from prefill, which takes longer."""
    output = min(_OUTPUT_TOKENS, context // 8)
    if asked.rate is not None:
        if asked.concurrency:
            raise PlanError("--rate and --concurrency are two kinds of load; give one of them")
        if not 0 < asked.rate < math.inf:
            raise PlanError(f"--rate {asked.rate:g} is not a load; give sessions per second above 0")
        return [Load(context, output, 0, asked.rate, requests=8)]
    loads = []
    for users in dict.fromkeys(asked.concurrency or (1,)):
        if users < 1:
            raise PlanError(f"{users} users can't be measured; give --concurrency 1 or more")
        new = Load(context, output, users, requests=users)
        cached = replace(new, cached=True)
        single_user = [cached, new] if asked.preset.prefill else [cached]
        loads += single_user if users == 1 else [new]
    return loads


def _tasks(asked: Asked) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(asked.tasks)) or asked.preset.tasks
    if unknown := [name for name in names if name not in TASKS]:
        raise PlanError(f"there is no task {', '.join(unknown)}; choose from {', '.join(TASKS)}")
    return names


def _margins(changes: Sequence[str], given: Margins) -> Margins:
    names = [field.name for field in fields(Margins)]
    changed: dict[str, float] = {}
    for change in changes:
        name, _, words = change.partition("=")
        try:
            value = float(words)
        except ValueError:
            value = -1.0
        if name not in names or not 0 < value < 1:
            raise PlanError(
                f"--margin {change} is not NAME=SHARE with one of {', '.join(names)} "
                "and a number between 0 and 1; write it like perplexity=0.03"
            )
        changed[name] = value
    return replace(given, **changed)


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]
