"""Sampling of the requests that measure: the most likely tokens of the model itself."""

from __future__ import annotations

from typing import TypedDict


class Greedy(TypedDict):
    """Options of ``Client.generate`` and ``Client.stream``."""

    temperature: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


# Penalties too: a field left unset takes the model's default, and some models have a repetition penalty.
GREEDY: Greedy = {
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
