"""Decodes a text as a deployment would, had it sampled the text's tokens itself.

A prompt's tokens are computed in one go, which a pattern may leave exact (top-k does): only decoding shows
what it costs. So the text's tokens are forced on the server one by one, in blocks at different places.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.evaluation.prompts import plain, special_before
from loadtest.evaluation.requests import at_once
from loadtest.greedy import GREEDY
from longspan import Client, LongspanError

BLOCK_TOKENS = 64
"""Tokens of a block: enough that decoding them costs more than finding their context in the prefix cache."""

BLOCKS = 8
"""Blocks of a slice of text, where the text has slices enough."""

WANTED_BLOCKS = 48
"""Blocks that a length should have in all; slices have more of them where the text has few slices."""

_PIECE = 200_000  # characters that are tokenized at once: a message must not grow with the text


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text by the model's tokenizer.

    Attributes:
        before: special tokens that the tokenizer puts before a text; every context begins with them.
        ids: of the text itself.
    """

    before: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """A stretch of the text that makes one context, and the blocks of it that are decoded.

    Attributes:
        length: tokens of the context.
        first_block: number of its first block.
        ids: tokens of the context, special ones before it included.
        starts: how many of them come before each block, ascending.
        block_tokens: tokens of a block.
    """

    length: int
    first_block: int
    ids: tuple[int, ...]
    starts: tuple[int, ...]
    block_tokens: int = BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Decoded:
    """A deployment's log probabilities of a block's tokens.

    Attributes:
        logprobs: natural log probability of each token.
        ids: the tokens.
        top: log probabilities of the most likely tokens at each place, by token, the most likely first.
        cached_tokens: of its prompt, found in the prefix cache.
    """

    logprobs: tuple[float, ...]
    ids: tuple[int, ...]
    top: tuple[dict[int, float], ...]
    cached_tokens: int


def tokens(client: Client, text: str, most: int) -> Tokens:
    """The first ``most`` tokens of a text, or all.

    Args:
        client: of any server of the model.
        text: cut at ends of lines into pieces that are tokenized apart.
        most: tokens that are needed.
    """
    ids: list[int] = []
    start = 0
    while start < len(text) and len(ids) < most:
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        ids += plain(client, text[start:end])
        start = end
    return Tokens(special_before(client), tuple(ids[:most]))


def slices(text: Tokens, length: int, seed: int, block_tokens: int = BLOCK_TOKENS) -> list[Slice]:
    """All slices of a text for contexts of one length, disjoint, in an order that the seed draws.

    Blocks start in the last half of a slice, so that contexts are between half of ``length`` and ``length``,
    at even distances and without overlap.

    Raises:
        ValueError: the text is too short for one slice, or ``length`` for one block.
    """
    own = length - len(text.before)
    first = length // 2
    room = length - first
    if first < len(text.before) + 2 or room < block_tokens:
        raise ValueError(
            f"a context of {length} tokens has no room for a block of {block_tokens} in its last half; "
            f"take contexts of at least {2 * (block_tokens + len(text.before)) + 4} tokens"
        )
    count = len(text.ids) // own
    if not count:
        raise ValueError(
            f"the text has {len(text.ids)} tokens, but a context of {length} needs {own}; give a longer text "
            "or shorter contexts"
        )
    blocks = min(max(BLOCKS, -(-WANTED_BLOCKS // count)), room // block_tokens)
    starts = tuple(first + room * (block + 1) // blocks - block_tokens for block in range(blocks))
    order = list(range(count))
    random.Random(f"{seed} {length}").shuffle(order)
    return [
        Slice(
            length,
            number * blocks,
            (*text.before, *text.ids[place * own : (place + 1) * own]),
            starts,
            block_tokens,
        )
        for number, place in enumerate(order)
    ]


def decode_slice(client: Client, part: Slice, top: int) -> list[Decoded | LongspanError]:
    """Decodes the blocks of a slice under the attention that the server serves.

    The longest prompt is sent first, by itself; those of the other blocks are its beginnings, so that the
    prefix cache has them but for a page. This holds with a window too: a prompt needs only the pages that its
    next token sees, and those that a longer prompt freed stay cached while there is room.

    Args:
        client: of the server.
        part: what to decode.
        top: most likely tokens to look at, each place; at most ``limits.logprobs`` of the server's model.

    Returns:
        One for each block, in the order of ``part.starts``; the server's error where it refuses one.

    Raises:
        longspan.UnavailableError: the server has ended.
    """
    longest = part.ids[: part.starts[-1] - 1]
    (computed,) = at_once([lambda: client.generate(longest, max_tokens=1, **GREEDY)])
    if isinstance(computed, LongspanError):
        return [computed] * len(part.starts)
    calls: list[Callable[[], Decoded]] = [
        functools.partial(_decode, client, part, start, top) for start in part.starts
    ]
    return at_once(calls)


def _decode(client: Client, part: Slice, start: int, top: int) -> Decoded:
    # The first token of an output follows from the prompt's own last row, not from decoding: it is one more,
    # which does not count.
    forced = part.ids[start - 1 : start + part.block_tokens]
    answer = client.generate(
        part.ids[: start - 1],
        forced_token_ids=forced,
        max_tokens=len(forced),
        ignore_eos=True,
        logprobs=top,
        **GREEDY,
    )
    positions = answer.completions[0].logprobs[1:]
    return Decoded(
        tuple(position.chosen.logprob for position in positions),
        forced[1:],
        tuple({entry.token_id: entry.logprob for entry in position.top} for position in positions),
        answer.usage.cached_prompt_tokens,
    )
