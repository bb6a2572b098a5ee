"""A comparison as one JSON document, ``longspan-compare/2``, that a later run goes on with.

Its fields are those of ``Comparison`` and, under ``judgment``, of ``Judgment``; ``schema.json`` beside this
file describes each. The judgment is written for readers and made anew from the rows when a document is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from loadtest import document
from loadtest.compare.equal import equal_pairs
from loadtest.compare.judge import judge
from loadtest.compare.schema import SCHEMA as SCHEMA  # exported: the schema of this module's documents
from loadtest.compare.types import Comparison, Plan
from loadtest.document import DocumentError, plain
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.busy import busy
from loadtest.measuring.types import Load, Measurement

# Null is NaN, except in fields that may be without a value.
_ROWS = ("speed", "answers", "text", "memory")
_OPTIONAL = ("depth",)

# Conditions that rows of two runs must share to stand in one table.
_SHARED = {
    "text_hash": "the text",
    "own_hash": "your own questions",
    "tasks_version": "the version of the tasks",
    "chat": "whether questions are asked through the chat template",
    "margins": "the margins",
    "confidence": "the confidence",
    "seed": "the seed",
    "arguments": "the arguments of longspan serve",
}
_MODEL = ("name", "architecture", "parameters", "dtype", "kv_dtype", "device")
_MACHINE = ("cpu", "cores")

_T = TypeVar("_T")
_Row = TypeVar("_Row", Answer, TextBlock, Memory, Measurement)


def save(comparison: Comparison, path: Path) -> None:
    """Writes the comparison and its judgment in one go: an interrupted run leaves the last whole document.

    Raises:
        OSError: the file can't be written.
    """
    document.save({"schema": SCHEMA, **plain(comparison), "judgment": plain(judge(comparison))}, path)


def load(path: Path) -> Comparison:
    """Reads a document.

    Raises:
        DocumentError: it can't be read, is of another schema, or lacks what a comparison has.
    """
    found = document.read(path, SCHEMA)
    found.pop("judgment", None)
    try:
        found |= {name: _with_nan(found[name]) for name in _ROWS if name in found}
        comparison = msgspec.convert(found, Comparison)
    except msgspec.ValidationError as error:
        raise DocumentError(
            f"{path} is damaged: {error}; remove it, or restore it from a copy, and run again"
        ) from error
    if not comparison.plan.candidates or not comparison.plan.contexts:
        raise DocumentError(f"{path} is damaged: its plan has no candidates or no contexts; remove it")
    return comparison


def join(comparison: Comparison, path: Path) -> Comparison:
    """A comparison that continues the file's: with its rows, and all that either plan measures.

    The plans may differ in candidates, contexts, loads and tasks, since rows are kept by those: a whole
    comparison adds to a quick one. Rows that failed are left out, so that they are measured again. The memory
    that sequences are counted for stays the file's: how much is free differs from minute to minute. Whether
    the machine was too busy is judged anew, from the rows of both.

    Args:
        comparison: the new one, with its plan and machine; its rows, if any, come after the file's.
        path: of a document; where there is none, ``comparison`` is returned as it is.

    Raises:
        DocumentError: the file is no comparison, or was measured under other conditions; it says which.
    """
    if not path.exists():
        return comparison
    earlier = load(path)
    differences = [*_plans_differ(earlier.plan, comparison.plan), *_places_differ(earlier, comparison)]
    if differences:
        raise DocumentError(
            f"{path} can't be continued, since these differ: {'; '.join(differences)}; "
            "name another file, or run as before"
        )
    rows: dict[str, Any] = {
        name: [*_whole(getattr(earlier, name)), *getattr(comparison, name)] for name in _ROWS
    }
    joined = replace(
        comparison,
        plan=_both(earlier.plan, comparison.plan),
        created=earlier.created,
        versions=comparison.versions or earlier.versions,
        model=comparison.model or earlier.model,
        running={**earlier.running, **comparison.running},
        spent=earlier.spent + comparison.spent,
        **rows,
    )
    joined.busy = busy(joined.speed, equal_pairs(joined), joined.plan.confidence)
    return joined


def _with_nan(value: Any) -> Any:
    """Rows as they were written: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _with_nan(item) if key not in _OPTIONAL else item for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def _whole(rows: Iterable[_Row]) -> list[_Row]:
    return [row for row in rows if not row.error]


def _plans_differ(earlier: Plan, now: Plan) -> list[str]:
    found = [
        f"{words} ({_short(getattr(earlier, field))} there, {_short(getattr(now, field))} now)"
        for field, words in _SHARED.items()
        if getattr(earlier, field) != getattr(now, field)
    ]
    first, ours = earlier.candidates[0], now.candidates[0]
    if first.command != ours.command:
        found.append(f"the baseline of the others ({first.command} there, {ours.command} now)")
    candidates = {candidate.name: candidate.command for candidate in earlier.candidates}
    found += [
        f"candidate {candidate.name} ({candidates[candidate.name]} there, {candidate.command} now)"
        for candidate in now.candidates[1:]
        if candidates.get(candidate.name, candidate.command) != candidate.command
    ]
    loads = {load.label: load for load in earlier.loads}
    found += [
        f"load {load.label} ({_size(loads[load.label])} there, {_size(load)} now)"
        for load in now.loads
        if loads.get(load.label, load) != load
    ]
    return found


def _places_differ(earlier: Comparison, now: Comparison) -> list[str]:
    """Models, machines and versions, as far as both know theirs."""

    def differ(
        name: str, there: Mapping[str, Any], here: Mapping[str, Any], keys: Iterable[str]
    ) -> list[str]:
        return [
            f"{name} {key} ({_short(there[key])} there, {_short(here[key])} now)"
            for key in keys
            if key in there and key in here and there[key] != here[key]
        ]

    return [
        *differ("the model's", earlier.model, now.model, _MODEL),
        *differ("the machine's", earlier.machine, now.machine, _MACHINE),
        *differ("the version of", earlier.versions, now.versions, sorted(earlier.versions)),
    ]


def _size(load: Load) -> str:
    return f"{load.requests} requests of {load.output_tokens} output tokens"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    text = str(plain(value)) if not isinstance(value, str) else value
    return (text[:60] + "...") if len(text) > 63 else text or "none"


def _both(earlier: Plan, now: Plan) -> Plan:
    """All that either plan measures. Loads stay in the order of the contexts, the operator's own first."""
    loads = _union(now.loads, earlier.loads, lambda load: load.label)
    contexts = tuple(sorted({*earlier.contexts, *now.contexts}))
    return replace(
        now,
        candidates=_union(earlier.candidates, now.candidates, lambda candidate: candidate.name),
        contexts=contexts,
        beyond=tuple(sorted({*earlier.beyond, *now.beyond})),
        loads=tuple(sorted(loads, key=lambda load: load.context)),
        tasks=_union(earlier.tasks, now.tasks, str),
        # A server's default is a share of the memory that is free at the time; all rows count for one.
        kv_memory=earlier.kv_memory or now.kv_memory,
    )


def _union(first: Iterable[_T], second: Iterable[_T], key: Callable[[_T], str]) -> tuple[_T, ...]:
    """All of the first, then those of the second with other keys."""
    known = {key(item): item for item in first}
    return (*known.values(), *(item for item in second if key(item) not in known))
