"""Conversations from a file in ShareGPT's format, as the field's benchmarks draw requests from it.

The file is a JSON list of objects with ``conversations``: a list of ``{"from": "human", "value": "..."}`` and
``{"from": "gpt", "value": "..."}``. A question and the answer after it become a request: the question is the
prompt, the answer's length in tokens the length of the output. The filters are those of vLLM's benchmark, so
that figures of the two can be compared.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from loadtest.load.types import Session, Turn, Wanted
from loadtest.load.workloads import WorkloadError

Pair = tuple[str, str]
"""A question and its answer."""

LEAST_TOKENS = 4
"""Shorter questions and answers are left out."""

_QUESTION = frozenset({"human", "user"})
_ANSWER = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})
_CHUNK = 1 << 20
# No conversation is this long; a file that is cut off or no list would else be searched to its end.
_MOST_ENTRY = 64 << 20
# No tokenizer makes so few tokens of so many letters; such texts are not worth being counted.
_MOST_LETTERS = 64
# Special tokens and a chat template come on top of what is counted.
_ROOM = 16


class Conversations:
    """The conversations of a file, which is read whole: its texts stay in memory.

    Args:
        path: of the file.

    Raises:
        WorkloadError: the file can't be read, or an entry is none of ShareGPT's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pairs = [pairs for pairs in _read(path) if pairs]
        if not self._pairs:
            raise WorkloadError(f"{path} has no conversation with a question and an answer")
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._pairs)

    def draw(
        self, sessions: int, seed: int, wanted: Wanted, count: Callable[[str], int], context: int = 1 << 30
    ) -> list[Session]:
        """Draws sessions without replacement; from the beginning again where too few are left.

        Args:
            sessions: how many.
            seed: of the draw.
            wanted: which requests are kept, and how long their outputs are.
            count: tokens of a text.
            context: of the model.

        Raises:
            WorkloadError: the limits leave nothing.
        """
        order = list(range(len(self._pairs)))
        random.Random(seed).shuffle(order)
        found: list[tuple[Turn, ...]] = []
        left_out: Counter[str] = Counter()
        for index in order:
            turns, why = self._turns(self._pairs[index], wanted, count, context)
            if turns:
                found.append(turns)
            left_out[why] += 1
            if len(found) == sessions:
                break
        if not found:
            reasons = ", ".join(f"{number} {why}" for why, number in left_out.most_common())
            raise WorkloadError(
                f"of the {len(order)} conversations of {self._path} none is left: {reasons}; raise "
                "--most-prompt-tokens or --most-total-tokens"
            )
        return [Session(index, found[index % len(found)]) for index in range(sessions)]

    def _turns(
        self, pairs: list[Pair], wanted: Wanted, count: Callable[[str], int], context: int
    ) -> tuple[tuple[Turn, ...], str]:
        """The requests of a conversation, or why it is left out."""
        turns: list[Turn] = []
        total, why = 0, ""
        for question, answer in pairs[: wanted.turns or 1]:
            most = min(wanted.most_total_tokens, context - _ROOM * (len(turns) + 1)) - total
            if (
                len(question) > _MOST_LETTERS * wanted.most_prompt_tokens
                or len(answer) > _MOST_LETTERS * wanted.most_total_tokens
            ):
                why = "too long"
                break
            prompt = self._count(question, count)
            output = wanted.output_tokens or self._count(answer, count)
            if prompt < LEAST_TOKENS or (wanted.output_tokens is None and output < LEAST_TOKENS):
                why = "too short"
                break
            if prompt > wanted.most_prompt_tokens or prompt + output > most:
                why = "too long"
                break
            total += prompt + output
            turns.append(Turn(question if wanted.turns is None else [("user", question)], output))
        return tuple(turns), why

    def _count(self, text: str, count: Callable[[str], int]) -> int:
        if text not in self._counts:
            self._counts[text] = count(text)
        return self._counts[text]


def _read(path: Path) -> Iterator[list[Pair]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, entry in enumerate(_entries(path, file), start=1):
                yield _pairs(path, number, entry)
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path} can't be read: {error}") from error


def _entries(path: Path, file: TextIO) -> Iterator[Any]:
    """The elements of a JSON list one by one, so that only texts that are needed stay in memory."""
    decoder = json.JSONDecoder()
    text, at, number = "", 0, 0

    def more() -> bool:
        nonlocal text, at
        chunk = file.read(_CHUNK)
        text, at = text[at:] + chunk, 0
        return bool(chunk)

    def next_sign() -> str:
        """The next character that is no blank; empty at the end."""
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            if at < len(text):
                return text[at]
            if not more():
                return ""

    if next_sign() != "[":
        raise WorkloadError(
            f"{path} is not a JSON list of conversations; ShareGPT's format is "
            '[{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}]'
        )
    at += 1
    if next_sign() == "]":
        return
    while True:
        number += 1
        next_sign()
        while True:
            try:
                entry, at = decoder.raw_decode(text, at)
                break
            except RecursionError as error:
                raise WorkloadError(f"{path}, entry {number}: is not JSON ({error})") from error
            except ValueError as error:
                if len(text) - at > _MOST_ENTRY or not more():
                    raise WorkloadError(f"{path}, entry {number}: is not JSON ({error})") from error
        yield entry
        sign = next_sign()
        at += 1
        if sign == "]":
            return
        if sign != ",":
            raise WorkloadError(
                f"{path}: after entry {number} comes {sign!r} instead of a comma"
                if sign
                else f"{path} ends after entry {number} without a closing bracket; is it whole?"
            )


def _pairs(path: Path, number: int, entry: Any) -> list[Pair]:
    """Questions of an entry with the answers that follow them; other turns, like a system's, are left out."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        raise WorkloadError(f"{path}, entry {number}: has no list called conversations")
    pairs: list[Pair] = []
    question: str | None = None
    for turn in turns:
        who = turn.get("from") if isinstance(turn, dict) else None
        value = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(who, str) or not isinstance(value, str):
            raise WorkloadError(f"{path}, entry {number}: a turn lacks the text from or value")
        if who in _QUESTION:
            question = _whole(value)
        elif who in _ANSWER and question is not None:
            pairs.append((question, _whole(value)))
            question = None
    return pairs


def _whole(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no other encoding."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
