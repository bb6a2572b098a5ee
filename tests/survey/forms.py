"""The forms in which checkpoints come, and what is expected of each."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import RefusedError
from server.models.resolve import resolve_model
from server.text.tokenizer import Tokenizer
from tests.models import checkpoint_forms
from tests.survey import gguf_files, tokenizer_files, weight_files
from tests.survey.oracle import Oracle
from tests.survey.outcome import MISSING, Outcome, Verdict
from tests.survey.try_one import describe, place, try_folder

EXACT = "exact"
_TEXTS = ("The  first text, of 1234 words.", " x", "x", "naïve 東京 🙂\n\n  end ")


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        name: as the table shows it.
        kind: ``weights``, ``GGUF`` or ``tokenizer``.
        write: writes it into an empty folder. Gives the model whose logits must come out, made by
            transformers from plain weights; of a tokenizer, what encodes text right. A GGUF file lies in the
            folder alone.
        expected: ``EXACT``, or a pattern of the sentence that refuses it.
        needs: a module without which it cannot be made or tried.
    """

    name: str
    kind: str
    write: Callable[[Path], Any]
    expected: str = EXACT
    needs: str = ""


FORMS: tuple[Form, ...] = (
    *(Form(name, "weights", write) for name, write in weight_files.FORMS.items()),
    *(Form(f.name, "weights", f.write, f.expected, f.needs) for f in checkpoint_forms.FORMS),
    *(Form(name, "GGUF", *rest) for name, *rest in gguf_files.FORMS),
    *(Form(name, "tokenizer", *rest) for name, *rest in tokenizer_files.FORMS),
)


def try_form(form: Form, folder: Path) -> Outcome:
    """Makes the form, serves it and compares, and holds the outcome to what is expected.

    Args:
        form: what to try.
        folder: an empty folder.
    """
    if form.needs and importlib.util.find_spec(form.needs) is None:
        return Outcome(Verdict.NOT_TRIED, f"{form.needs} {MISSING}")
    (made := folder / "model").mkdir()
    right = form.write(made)
    files = sorted(made.glob("*.gguf"))
    try:
        found = resolve_model(
            str(files[0] if files else made), folder / "cache", lambda stage, part: None, pickles=True
        )
        outcome = (
            _try_text(found.tokenizer, right) if form.kind == "tokenizer" else _try_model(found.folder, right)
        )
    except RefusedError as error:
        outcome = Outcome(Verdict.REFUSED, str(error))
    except Exception as error:
        outcome = Outcome(Verdict.CRASHED, f"{describe(error)} at {place(error)}")
    outcome = Outcome(
        outcome.verdict, outcome.detail.replace(str(made), "FOLDER").replace(str(folder), "FOLDER")
    )
    return _held(form, outcome)


def _try_model(folder: Path, right: Any) -> Outcome:
    return try_folder(folder, compare_with=None if right is None else Oracle(right))


def _try_text(folder: Path | None, encode: Callable[[str], list[int]]) -> Outcome:
    if folder is None:
        return Outcome(Verdict.EXACT, "token ids are served, and no text")
    tokenizer = Tokenizer(folder)
    for text in _TEXTS:
        if (ids := tokenizer.encode(text)) != encode(text):
            return Outcome(Verdict.WRONG, f"{text!r} is {ids} instead of {encode(text)}")
    return Outcome(Verdict.EXACT)


def _held(form: Form, outcome: Outcome) -> Outcome:
    """What is served though it must be refused, or the other way round, is wrong."""
    if form.expected == EXACT:
        expected = outcome.verdict is not Verdict.REFUSED
    else:
        expected = outcome.verdict is Verdict.REFUSED and bool(re.search(form.expected, outcome.detail))
    if expected or outcome.verdict in (Verdict.NOT_TRIED, Verdict.CRASHED):
        return outcome
    wanted = "must be served" if form.expected == EXACT else f"must be refused with {form.expected!r}"
    return Outcome(Verdict.WRONG, f"{wanted}, and is {outcome.verdict}: {outcome.detail}")
