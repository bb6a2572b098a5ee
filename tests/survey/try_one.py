"""Serves one folder as the server's engine does, and compares all log probabilities with transformers'."""

from __future__ import annotations

import traceback
from pathlib import Path

import transformers

from server.engine.build import build_engine
from server.errors import RefusedError
from tests.survey.architectures import Case, config_of
from tests.survey.build import build
from tests.survey.compare import TOLERANCE, compare, insensitive, rounding
from tests.survey.oracle import Oracle
from tests.survey.outcome import Outcome, Verdict
from tests.survey.serving import MAX_TOKENS, prompts_beyond, serve, settings
from tests.survey.sizes import CONTEXT
from tests.survey.thresholds import thresholds

# Beyond this rounding proves nothing.
_MOST_ROUNDING = 0.05


def try_case(case: Case, folder: Path) -> Outcome:
    """Makes the model, serves it and compares.

    Args:
        case: what to try.
        folder: an empty folder, for the model.
    """
    try:
        config = config_of(case)
        model = build(config, case.auto)
    except Exception as error:  # whatever keeps a class from being built small
        return Outcome(Verdict.NOT_TRIED, f"a small one cannot be built: {describe(error)}")
    try:
        model.save_pretrained(folder)
    except Exception as error:
        return Outcome(Verdict.NOT_TRIED, f"transformers cannot save it: {describe(error)}")
    return try_folder(folder, Oracle(model), case.auto)


def try_folder(
    folder: Path,
    original: Oracle | None = None,
    auto: str = "AutoModelForCausalLM",
    compare_with: Oracle | None = None,
) -> Outcome:
    """Serves a folder and compares.

    Args:
        folder: a Hugging Face folder.
        original: the model that the folder was written from, which must be what transformers reads there.
        auto: the class of transformers that loads the folder.
        compare_with: what is right; ``None`` for what transformers reads from the folder.
    """
    config = original.model.config if original else transformers.AutoConfig.from_pretrained(folder)
    limits = thresholds(config)
    prompts = prompts_beyond(max(limits.values(), default=0))
    try:
        before = original.logprobs(prompts[-1], [0]) if original else None
        if before is not None and not before.isfinite().all():
            before = None
        if before is None:
            reason = "transformers' own logits are not finite"
    except Exception as error:
        before, reason = None, f"transformers' own forward fails: {describe(error)}"
    hint = blown = ""
    try:
        try:
            core, ready = build_engine(settings(), folder, lambda stage, fraction: None)
        except RefusedError as error:
            if "--max-context N" not in str(error):
                raise
            # What the operator is told to do must help.
            hint = f"with --max-context {CONTEXT}"
            core, ready = build_engine(settings(max_context=CONTEXT), folder, lambda stage, fraction: None)
    except RefusedError as error:
        sentence = str(error).replace(str(folder), "FOLDER")
        return Outcome(Verdict.REFUSED, f"{hint}: {sentence}" if hint else sentence)
    except Exception as error:
        if original and before is None:
            return Outcome(Verdict.NOT_TRIED, reason)
        return Outcome(Verdict.CRASHED, f"at start: {describe(error)} at {place(error)}")
    if original and before is None:
        return Outcome(Verdict.NOT_TRIED, reason)
    room = ready.context_length - MAX_TOKENS
    prompts = [prompt[:room] for prompt in prompts if room > 0]
    try:
        rounds = serve(core, prompts, ready.vocabulary_size)
    except Exception as error:
        return Outcome(Verdict.CRASHED, f"while serving: {describe(error)} at {place(error)}")
    oracle = compare_with or Oracle.load(folder, auto)
    if before is not None:
        again = oracle.logprobs(prompts[-1], [0])
        if not float((again - before[: len(again)]).abs().max()) < TOLERANCE:
            return Outcome(
                Verdict.NOT_TRIED, "transformers does not read from the folder what it saved there"
            )
    if weak := insensitive(oracle, prompts[-1]):
        return Outcome(Verdict.NOT_TRIED, weak)
    worst, what = compare(oracle, prompts, rounds)
    if not worst <= TOLERANCE:
        # Some small models blow rounding up: float64 tells whose it is.
        sharp = oracle.in_float64()
        own = rounding(oracle, sharp, prompts, rounds)
        if own > _MOST_ROUNDING:
            return Outcome(Verdict.NOT_TRIED, "its small model makes too much of float32's rounding")
        worst, what = compare(sharp, prompts, rounds)
        if not worst <= max(TOLERANCE, 4 * own):
            return Outcome(Verdict.WRONG, f"differs by {worst:.2g}: {what}")
        blown = (
            f"within float32's rounding, which changes transformers' own log probabilities by {own:.1g} here"
        )
    reached = len(prompts[-1]) + MAX_TOKENS
    notes = [hint, blown, f"beyond {_listed(limits)}" if limits else ""]
    short = {name: value for name, value in limits.items() if 2 * value > reached}
    if short:
        return Outcome(Verdict.NOT_TRIED, f"{reached} tokens are not beyond {_listed(short)}")
    return Outcome(Verdict.EXACT, "; ".join(filter(None, notes)))


def describe(error: BaseException) -> str:
    """The exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def place(error: BaseException) -> str:
    """Where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _listed(limits: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in limits.items())
