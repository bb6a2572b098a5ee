"""The two forms of the benchmark: the whole one for a GPU, a small one that runs anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadtest.direct.device.shapes import LLAMA_8B, TINY, Shape

# Beyond the tokens that a workload needs: summaries of pages, pages that are not full, placing in steps.
_ROOM = 1.25
_PAGES = 128

Load = tuple[int, int, int]
"""Requests that come at once, tokens of each prompt, tokens of each output."""


@dataclass(frozen=True, slots=True)
class Form:
    """One form of the benchmark, with its sizes.

    Attributes:
        name: of the form.
        shape: of the model.
        cuda: needs a CUDA device.
        buffer: bytes of the buffer that tells the memory's bandwidth; on a CPU at most.
        repeats: of its reading, and of the products that tell the matrix rate.
        decode_context: tokens before the timed decode steps of one stream.
        decode_steps: of these.
        prefill_tokens: of one prompt.
        single: the load of one stream after another.
        batch: the load of many streams at once.
        contexts: the short and the long context whose decode steps are compared.
        context_steps: of these.
        patterns: under which they are compared: settings of attention.
        seconds: that each part is expected to take, in the order in which they run: by worth, but the peer,
            which is not in our hands, comes last.
    """

    name: str
    shape: Shape
    cuda: bool
    buffer: int
    repeats: int
    decode_context: int
    decode_steps: int
    prefill_tokens: int
    single: Load
    batch: Load
    contexts: tuple[int, int]
    context_steps: int
    patterns: dict[str, dict[str, Any]]
    seconds: dict[str, float]

    def settings(self, folder: str) -> dict[str, Any]:
        """Settings of the engine, except for long contexts, as ``server.settings.Settings`` takes them.

        Settings that are not named here come from the environment, as it does for the server: say,
        ``LONGSPAN_KERNEL=triton``.
        """
        streams, prompt, output = self.batch
        longest = max(self.prefill_tokens, self.decode_context + self.decode_steps, prompt + output) + 16
        return self._settings(folder, "full", {}, max(streams * (prompt + output), longest), longest)

    def long_settings(self, folder: str, pattern: str) -> dict[str, Any]:
        """Settings of the engine for long contexts under one of ``patterns``."""
        longest = max(self.contexts) + self.context_steps + 16
        chosen = self.patterns[pattern]
        return self._settings(folder, chosen["attention"], chosen["attention_option"], longest, longest)

    def _settings(
        self, folder: str, attention: str, options: dict[str, str], tokens: int, longest: int
    ) -> dict[str, Any]:
        room = _ROOM * tokens + 16 * _PAGES
        return {
            "model": folder,
            "weights": "float",
            "attention": attention,
            "attention_option": options,
            "prefix_cache": False,
            "max_running": self.batch[0],
            "max_batch_tokens": max(self.prefill_tokens, self.batch[0]),
            "max_context": longest,
            "kv_memory": int(room * self.shape.kv_bytes(2 if self.cuda else 4)),
        }


def _patterns(window: int, sinks: int, budget: int) -> dict[str, dict[str, Any]]:
    return {
        "window": {
            "attention": "sliding_window",
            "attention_option": {"window": str(window), "sinks": str(sinks)},
        },
        "top-k": {
            "attention": "sparse",
            "attention_option": {"pattern": "topk", "budget": str(budget)},
        },
    }


WHOLE = Form(
    name="whole",
    shape=LLAMA_8B,
    cuda=True,
    buffer=4 << 30,
    repeats=100,
    decode_context=512,
    decode_steps=64,
    prefill_tokens=8192,
    single=(3, 128, 128),
    batch=(256, 128, 128),
    contexts=(4096, 131_000),
    context_steps=24,
    patterns=_patterns(1020, 4, 512),
    seconds={
        "machine": 20,
        "model": 90,
        "direct": 80,
        "served": 90,
        "window": 45,
        "top-k": 45,
        "transformers": 100,
    },
)

SMALL = Form(
    name="small",
    shape=TINY,
    cuda=False,
    buffer=512 << 20,
    repeats=5,
    decode_context=32,
    decode_steps=8,
    prefill_tokens=128,
    single=(2, 16, 8),
    batch=(4, 16, 8),
    contexts=(64, 512),
    context_steps=4,
    patterns=_patterns(28, 4, 64),
    seconds=dict.fromkeys(WHOLE.seconds, 1.0),
)
