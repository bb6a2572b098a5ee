"""The user's own questions, from a file with a JSON object a line.

The question: ``prompt``; or ``context`` and ``question``; or ``messages`` of a chat, a list of objects with
``role`` and ``content``. A context ends with one line end, and its questions share it. ``answer_prefix``:
words that the answer begins with. ``max_new_tokens``: of the answer; 128 if left out.

The known answer, if there is one: ``contains``, a text or a list of texts, all of them, case
ignored; or ``regex``, which must match somewhere; or ``json``, a value that must be somewhere in the answer.
With none of them, only the agreement with full attention can be measured.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from loadtest.tasks.score import parse_json
from loadtest.tasks.types import Sample

TASK = "own"
"""The samples' task name."""

_MAX_NEW_TOKENS = 128
_ASKED = ("prompt", "context", "question", "messages")
_KNOWN = ("contains", "regex", "json")
_OTHER = ("answer_prefix", "max_new_tokens")


def read(file: Path) -> list[Sample]:
    """The samples of a file. Their length is 0, since no tokenizer has counted them, and they have no target.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no question, or a line is not one; says which, and what to do.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); convert it") from error
    contexts: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
    turns: list[int] = []
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sample = _sample(_object(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        index = contexts.setdefault((sample.context, sample.messages), len(contexts))
        turns += [0] * (len(contexts) - len(turns))
        samples.append(replace(sample, index=index, turn=turns[index]))
        turns[index] += 1
    if not samples:
        raise ValueError(
            f'{file} has no question; write one a line, like {{"prompt": "...", "contains": "..."}}'
        )
    return samples


def _object(line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); write an object on one line") from error
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "it has half a character, like \\\\ud800 alone, which is not text; correct it"
        ) from error
    if not isinstance(row, dict):
        raise ValueError('not a JSON object; write one, like {"prompt": "..."}')
    names = (*_ASKED, *_KNOWN, *_OTHER)
    unknown = sorted(row.keys() - set(names))
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(names)}")
    return row


def _sample(row: dict[str, Any]) -> Sample:
    context, question, messages = _asked(row)
    answer, match = _known(row)
    prefix = row.get("answer_prefix", "")
    if not isinstance(prefix, str):
        raise ValueError("answer_prefix is not text; put it in quotes")
    tokens = row.get("max_new_tokens", _MAX_NEW_TOKENS)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError("max_new_tokens is not a whole number of at least 1; give one or leave it out")
    return Sample(
        task=TASK,
        context=context,
        question=question,
        answer_prefix=prefix,
        answer=answer,
        max_new_tokens=tokens,
        target="",
        length=0,
        match=match,
        messages=messages,
    )


def _asked(row: dict[str, Any]) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """Context, question and messages."""
    given = [name for name in _ASKED if name in row]
    if given not in (["prompt"], ["context", "question"], ["messages"]):
        raise ValueError(
            f"it has {' and '.join(given) or 'nothing to ask'}; give prompt, or context and question, or "
            "messages"
        )
    if given == ["messages"]:
        return "", "", _messages(row["messages"])
    for name in given:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{name} is not text; write one in quotes")
    if given == ["prompt"]:
        return row["prompt"], "", ()
    # A line end keeps the tokens of the context the same for every question.
    return f"{row['context'].rstrip()}\n", row["question"], ()


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError('messages is not a list of messages; write [{"role": "user", "content": "..."}]')
    messages = []
    for message in value:
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or not all(isinstance(text, str) for text in message.values())
        ):
            raise ValueError("a message has something else than role and content, both texts; write both")
        messages.append((message["role"], message["content"]))
    return tuple(messages)


def _known(row: dict[str, Any]) -> tuple[tuple[str, ...], Literal["all", "regex", "json"]]:
    """The answer, and how it is looked for."""
    given = [name for name in _KNOWN if name in row]
    if len(given) > 1:
        raise ValueError(f"it has {' and '.join(given)}; keep one, or write a question for each")
    if not given:
        return (), "all"
    value = row[given[0]]
    if given == ["json"]:
        return (json.dumps(value, ensure_ascii=False),), "json"
    if given == ["regex"]:
        if not isinstance(value, str) or not value:
            raise ValueError("regex is not text; write a regular expression in quotes")
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"regex is not a regular expression: {error}; correct it") from error
        return (value,), "regex"
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) and each for each in texts):
        raise ValueError("contains is not text or a list of texts; write what the answer must have in quotes")
    return tuple(texts), "all"
