"""Caveats to read before trusting a run's figures."""

from __future__ import annotations

from loadtest.load.result import Run
from loadtest.load.rows import Row

# A chat template begins all prompts alike.
_MOST_CHANCE = 0.05


def _remarks(run: Run) -> list[str]:
    """Remarks of one run, except its disturbance."""
    failed = ", ".join(f"{count} {code}" for code, count in run.summary.failed.items())
    return [
        *(["INTERRUPTED: it was stopped before its end"] if run.interrupted else []),
        *(f"INVALID: {objection}" for objection in run.objections),
        *([f"failed: {failed}"] if failed else []),
        *(f"client and server disagree: {sentence}" for sentence in run.disagreements),
        *(
            [f"{other} of {run.summary.requests} answers had another length than asked for"]
            if (other := run.summary.other_length)
            else []
        ),
        *_cached(run),
        *_speculated(run),
    ]


def _cached(run: Run) -> list[str]:
    cached, prompts = run.summary.cached_tokens, run.summary.prompt_tokens
    if not cached:
        return []
    told = f"{cached / prompts:.0%} of the prompt tokens came from the prefix cache"
    if run.workload.get("fresh") and cached > _MOST_CHANCE * prompts:
        told += (
            f", though no two prompts of this workload share a beginning: it knows them from an earlier run "
            f"with seed {run.seed}; leave out --seed to draw new ones"
        )
    return [told]


def _speculated(run: Run) -> list[str]:
    """The rate of acceptance, and the tokens that a sequence got in a step: without drafts 1."""
    server = run.server
    if server is None or not server.draft_tokens:
        return []
    drafted, right = server.draft_tokens, server.accepted_draft_tokens
    a_step = server.output_tokens / max(1.0, server.output_tokens - right)
    return [
        f"{right / drafted:.0%} of {drafted:.0f} drafts were accepted: {a_step:.2f} tokens per step "
        "of a sequence"
    ]


def remarks_of(row: Row) -> list[tuple[str, str]]:
    """Remarks of all repeats of a row, which repeat it was said of where not all share it."""
    notes = []
    if row.disturbed:
        last = row.disturbed[-1].disturbed
        others = [run for run in row.runs if not run.disturbed]
        notes.append(
            f"{len(row.disturbed)} of {len(row.disturbed) + len(others)} runs were disturbed and don't "
            f"count; the last: {last}"
            if others
            else f"INVALID: every run was disturbed; the last: {last}"
        )
    said: dict[str, list[int]] = {}
    for run in row.runs:
        for remark in _remarks(run):
            said.setdefault(remark, []).append(run.repeat + 1)
    return [
        *((row.label, note) for note in notes),
        *(
            (row.label + (f", run {', '.join(map(str, which))}" if len(which) < len(row.runs) else ""), said_)
            for said_, which in said.items()
        ),
    ]
