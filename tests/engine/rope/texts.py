"""Prompts around the length that small models were trained for, and what they are served with."""

from __future__ import annotations

import random

from tests.models_zoo import VOCABULARY

OWN = 40
WINDOW = {"window": "17", "sinks": "3"}
IN_CACHE = {"backend": "sliding_window", "options": {**WINDOW, "positions": "cache"}}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
MAX_TOKENS = 12


def prompts_of(*lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(4, VOCABULARY) for _ in range(n)] for n in lengths]


def tokens_of(outcomes):
    return [outcome.tokens for outcome in outcomes.values()]
