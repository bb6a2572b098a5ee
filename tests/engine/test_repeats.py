"""Tokens that would repeat a run, and what finding them may cost."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable

import pytest

from server.engine.repeats import TYPE, repeating


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5])
def test_runs_are_found_wherever_they_are(size):
    drawn = random.Random(size)
    for length in (0, 1, 2, 4, 5, 40):
        tokens = [drawn.randrange(3) for _ in range(length)]
        newest = tokens[max(0, length - size + 1) :]
        places = range(length - size + 1) if size else ()
        ends = {tokens[i + size - 1] for i in places if tokens[i : i + size - 1] == newest}
        assert repeating(array(TYPE, tokens), size) == sorted(ends)


def test_a_long_prompt_of_one_token_holds_no_step_up():
    tokens = array(TYPE, [7] * 131_072)

    def seconds(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    assert repeating(tokens, 64) == [7]
    took = min(seconds(lambda: repeating(tokens, 64)) for _ in range(3))
    # 2 to 8 times that of looking at each token once; a comparison at each place by itself took 100 times.
    assert took < 40 * min(seconds(lambda: [each for each in tokens if each == 7]) for _ in range(3))
    tokens.append(7)  # nothing holds on to it
