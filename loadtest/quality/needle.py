"""Whether a served model finds a number that was told once, somewhere in a long text.

The task is passkey retrieval (Mohtashami and Jaggi: Landmark Attention, 2023, section 4.2), at chosen
depths, as in needle-in-a-haystack tests.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from loadtest.greedy import GREEDY
from loadtest.quality.types import Needle
from longspan import Client

_TASK = "There is a pass key hidden in a long text. Find it and remember it. I will ask you for it."
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
# It ends within the answer; asked in fewer words, the default model answers from the text about it.
_QUESTION = "The text ends here. What is the pass key that was hidden in the text above? The pass key is"


def needles(
    client: Client, filler: Sequence[str], length: int, depths: Sequence[float], keys_per_depth: int
) -> list[Needle]:
    """Asks for seven-digit numbers, greedily; each must come exactly.

    Args:
        client: of the server.
        filler: sentences of a text that says nothing of pass keys; repeated if they are too few.
        length: tokens of each prompt, at most, and no less than a sentence short of it.
        depths: where the number stands, as shares of the text: 0 at its beginning, 1 at its end.
        keys_per_depth: how many numbers to hide at each depth, one at a time.

    Returns:
        The deepest first, because those prompts have most in common: a server with a prefix cache then
        computes the text only once.

    Raises:
        ValueError: not even one sentence fits into ``length``.
        LongspanError: the server cannot take such a prompt.
    """
    count = _fitting(client, filler, length)
    results = []
    for depth in sorted(depths, reverse=True):
        for number in range(keys_per_depth):
            key = str(random.Random(f"{number} {depth}").randrange(10**6, 10**7))
            answer = client.generate(_prompt(filler, count, depth, key), max_tokens=12, **GREEDY)
            results.append(Needle(depth, key, answer.text.strip(), answer.usage.prompt_tokens))
    return results


def _prompt(filler: Sequence[str], count: int, depth: float, key: str) -> str:
    sentences = [filler[index % len(filler)] for index in range(count)]
    sentences.insert(round(depth * count), _NEEDLE.format(key=key))
    return f"{_TASK}\n{' '.join(sentences)}\n\n{_QUESTION}"


def _fitting(client: Client, filler: Sequence[str], length: int) -> int:
    """The most sentences with which the prompt keeps within ``length`` tokens, by halving."""
    fits, fails = 0, length
    while fails - fits > 1:
        middle = (fits + fails) // 2
        # The number's digits may be tokens each: the widest stands for all.
        if client.count_tokens(_prompt(filler, middle, 0.5, "0" * 7)).token_count <= length:
            fits = middle
        else:
            fails = middle
    if not fits:
        raise ValueError(f"no sentence of filler fits into {length} tokens beside the question; allow more")
    return fits
