"""How far a deployment's next-token distributions are from full attention's, as far as the wire tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from loadtest.evaluation.text import Decoded, Slice
from loadtest.evaluation.types import TextBlock
from longspan import LongspanError

# Probabilities come as 32-bit floats: the rest of 1 after 20 of them is known no better than this.
_LEAST = 1e-6


def blocks_against(
    deployment: str,
    part: Slice,
    own: Sequence[Decoded | LongspanError],
    full: Sequence[Decoded | LongspanError] | None = None,
) -> list[TextBlock]:
    """A deployment's rows of a slice of text.

    Args:
        deployment: its name.
        part: the slice.
        own: what ``decode_slice`` gave for it.
        full: the same for full attention; ``None`` if this is full attention itself.

    Returns:
        One for each block.
    """
    rows = []
    for offset, (start, ours) in enumerate(zip(part.starts, own, strict=True)):
        number = part.first_block + offset
        if isinstance(ours, LongspanError):
            rows.append(TextBlock(deployment, part.length, number, start, error=str(ours)))
            continue
        theirs = full[offset] if full is not None else None
        kl = same = math.nan
        if isinstance(theirs, Decoded) and all(theirs.top) and all(ours.top):
            kl, same = divergence(theirs, ours), same_top(theirs, ours)
        rows.append(TextBlock(deployment, part.length, number, start, ours.logprobs, kl, same))
    return rows


def divergence(full: Decoded, own: Decoded) -> float:
    """A lower bound of the KL divergence from full's next-token distribution to the other's, nats per token.

    The vocabulary is parted into the tokens whose probability is known of both (those that are among the most
    likely of both, and the text's own) and all others together. The distributions over the parts can't be
    further apart than those over the tokens (the data-processing inequality; Cover and Thomas: Elements of
    Information Theory, 2006, theorem 2.7.1, the log sum inequality).
    """
    return fmean(
        _divergence({**theirs, token: their_own}, {**ours, token: our_own})
        for token, theirs, their_own, ours, our_own in zip(
            full.ids, full.top, full.logprobs, own.top, own.logprobs, strict=True
        )
    )


def same_top(full: Decoded, own: Decoded) -> float:
    """The share of places where both hold the same token for the most likely one.

    A token counts as full's most likely one too if full finds it exactly as likely as its first.
    """
    return fmean(
        next(iter(ours)) in {token for token, logprob in theirs.items() if logprob == max(theirs.values())}
        for theirs, ours in zip(full.top, own.top, strict=True)
    )


def _divergence(full: dict[int, float], own: dict[int, float]) -> float:
    shared = full.keys() & own.keys()
    known = math.fsum(math.exp(full[token]) * (full[token] - own[token]) for token in shared)
    rest = max(_LEAST, 1 - math.fsum(math.exp(full[token]) for token in shared))
    own_rest = max(_LEAST, 1 - math.fsum(math.exp(own[token]) for token in shared))
    # Rounding can give a value slightly below 0, and a divergence is not negative.
    return max(0.0, known + rest * math.log(rest / own_rest))
