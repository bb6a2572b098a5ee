"""Workloads, drawn from a seed or read from a file.

Prompts of token ids are random ones, so that a prompt has exactly the length that was drawn and no two share
a prefix unless the workload is about that. Conversations are of real text, since a chat template needs text.
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.load.types import LoadTestError, Message, Session, Turn


@dataclass(frozen=True, slots=True)
class Shape:
    """The parameters that workloads are drawn with.

    Attributes:
        sessions: how many.
        prompt_tokens: of a request, or its most; the length of the shared part comes on top of it.
        output_tokens: of a request, or its most.
        vocabulary: the model's.
        context: most tokens of prompt and output together.
        seed: of all draws.
        groups: shared prefixes, for ``shared_prefix``.
        prefix_tokens: of each of them.
        turns: of a conversation, for ``multi_turn``.
    """

    sessions: int
    prompt_tokens: int
    output_tokens: int
    vocabulary: int
    context: int
    seed: int = 0
    groups: int = 4
    prefix_tokens: int = 512
    turns: int = 4


class WorkloadError(LoadTestError):
    """The workload can't be made; the message says what to change."""


def fixed(shape: Shape) -> list[Session]:
    """Every prompt and every output of exactly the same length."""
    ids = _ids(shape)
    return _single(shape, lambda: (ids(shape.prompt_tokens), shape.output_tokens))


def sharegpt(shape: Shape) -> list[Session]:
    """Lengths like those of ShareGPT's conversations: log-normal with means of 161 and 338 tokens.

    Means from Kwon et al.: PagedAttention, 2023, section 6.1; the spread (sigma 1.1 and 0.9) is chosen to
    give its long tail. ``prompt_tokens`` and ``output_tokens`` cut the tail off.
    """
    ids, rng = _ids(shape), random.Random(shape.seed + 1)

    def draw() -> tuple[list[int], int]:
        prompt = _log_normal(rng, 161, 1.1, 4, shape.prompt_tokens)
        return ids(prompt), _log_normal(rng, 338, 0.9, 4, shape.output_tokens)

    return _single(shape, draw)


def long_context(shape: Shape) -> list[Session]:
    """Prompts between half of ``prompt_tokens`` and all of it, drawn evenly; outputs of the same length."""
    ids, rng = _ids(shape), random.Random(shape.seed + 1)
    least = max(1, shape.prompt_tokens // 2)
    return _single(shape, lambda: (ids(rng.randint(least, shape.prompt_tokens)), shape.output_tokens))


def shared_prefix(shape: Shape) -> list[Session]:
    """Each prompt begins with one of ``groups`` prefixes, by turns, and goes on by itself."""
    ids = _ids(shape)
    prefixes = [ids(shape.prefix_tokens) for _ in range(shape.groups)]
    order = iter(range(shape.sessions))
    return _single(
        shape,
        lambda: (prefixes[next(order) % shape.groups] + ids(shape.prompt_tokens), shape.output_tokens),
    )


def multi_turn(shape: Shape) -> list[Session]:
    """Conversations of ``turns`` questions, each with all that was said before; prompts grow as they go on.

    A question is a passage of English of about ``prompt_tokens`` tokens, by 4 letters to a token.
    """
    rng = random.Random(shape.seed)
    text = " ".join(" ".join(topic.split()) for topic in pydoc_data.topics.topics.values())
    letters = 4 * shape.prompt_tokens

    def question() -> list[Message]:
        start = rng.randrange(max(1, len(text) - letters))
        return [("user", text[start : start + letters])]

    return [
        Session(index, tuple(Turn(question(), shape.output_tokens) for _ in range(shape.turns)))
        for index in range(shape.sessions)
    ]


WORKLOADS: dict[str, Callable[[Shape], list[Session]]] = {
    "fixed": fixed,
    "sharegpt": sharegpt,
    "long-context": long_context,
    "shared-prefix": shared_prefix,
    "multi-turn": multi_turn,
}


def from_file(path: Path, shape: Shape) -> list[Session]:
    """Sessions from a JSONL file, in its order, from the beginning again where it has too few.

    A line is an object with one of ``prompt`` (text), ``token_ids``, ``messages`` (role and content each), or
    ``turns`` (a list of texts, a conversation), and optionally ``output_tokens``.

    Raises:
        WorkloadError: the file can't be read, or a line is none of these.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path} can't be read: {error}") from error
    if not lines:
        raise WorkloadError(f"{path} has no lines; each is a JSON object with a prompt")
    turns = [_turns(path, number, line, shape) for number, line in enumerate(lines, start=1)]
    return [Session(index, turns[index % len(turns)]) for index in range(shape.sessions)]


def _turns(path: Path, number: int, line: str, shape: Shape) -> tuple[Turn, ...]:
    def wrong(what: str) -> WorkloadError:
        return WorkloadError(f"{path}, line {number}: {what}")

    try:
        entry: Any = json.loads(line)
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise wrong("has half a character, like \\ud800 alone, which is not text; correct it") from error
    except (ValueError, RecursionError) as error:
        raise wrong(f"is not JSON ({error})") from error
    kinds = {"prompt", "token_ids", "messages", "turns"}
    if not isinstance(entry, dict) or len(kinds & entry.keys()) != 1:
        raise wrong(f"must be an object with exactly one of {', '.join(sorted(kinds))}")
    output = entry.get("output_tokens", shape.output_tokens)
    if not isinstance(output, int) or output < 1:
        raise wrong(f"output_tokens is {output!r}; it must be a whole number of at least 1")
    match entry:
        case {"prompt": str(text)}:
            return (Turn(text, output),)
        case {"token_ids": list(ids)} if ids and all(isinstance(id_, int) and id_ >= 0 for id_ in ids):
            return (Turn(ids, output),)
        case {"messages": list(messages)} if messages and all(_is_message(m) for m in messages):
            return (Turn([(m["role"], m["content"]) for m in messages], output),)
        case {"turns": list(texts)} if texts and all(isinstance(text, str) for text in texts):
            return tuple(Turn([("user", text)], output) for text in texts)
    raise wrong(
        "prompt must be a text, token_ids a list of whole numbers, messages a list of objects with role and "
        "content, turns a list of texts"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _single(shape: Shape, draw: Callable[[], tuple[list[int], int]]) -> list[Session]:
    sessions = []
    for index in range(shape.sessions):
        prompt, output = draw()
        if len(prompt) + output > shape.context:
            raise WorkloadError(
                f"a prompt of {len(prompt)} tokens and an output of {output} don't fit the model's context "
                f"of {shape.context}; ask for shorter ones"
            )
        sessions.append(Session(index, (Turn(prompt, output),)))
    return sessions


def _log_normal(rng: random.Random, mean: float, sigma: float, least: int, most: int) -> int:
    drawn = rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
    return max(min(least, most), min(most, round(drawn)))


def _ids(shape: Shape) -> Callable[[int], list[int]]:
    """Draws so many token ids, without special ones as far as can be known from outside."""
    # The lowest ids are special tokens in most vocabularies.
    rng, low = random.Random(shape.seed), min(1000, shape.vocabulary // 2)
    return lambda count: [rng.randrange(low, shape.vocabulary) for _ in range(count)]
