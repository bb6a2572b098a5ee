"""Six tests of what attention patterns do to a model.

The bounds are known outcomes of the default model, SmolLM2-135M-Instruct. On another model or text a failed
test is a finding, not a fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from loadtest import texts
from loadtest.deployment import FULL, topk, window
from loadtest.greedy import GREEDY
from loadtest.quality.decode_time import decode_times
from loadtest.quality.deployments import BEYOND, FULL_BEYOND, TRAINED, covering, exact, window_beyond
from loadtest.quality.measurement import Check, Measurement
from loadtest.quality.needle import needles
from loadtest.quality.perplexity import perplexity, pooled
from loadtest.quality.residency import pages_held
from loadtest.quality.types import DecodeTime, Needle, Outcome, Perplexity
from longspan import Client

_DEPTHS = (0.1, 0.5, 0.98)


def sinks(text: str, slices: int) -> Check:
    """Test 1: perplexity at 4,096 tokens under a window, with sinks and without, over several slices."""
    title = "perplexity at 4k"

    def measure(client: Client) -> Perplexity:
        ids = texts.tokens(client, text, slices * 4096)
        parts = [perplexity(client, ids[start : start + 4096], 1024) for start in range(0, len(ids), 4096)]
        return pooled(parts)

    full, kept, bare = (Measurement(on, measure) for on in (FULL, window(512, 4), window(512, 0)))

    def with_sinks() -> Outcome:
        base, value = full.result.value, kept.result.value
        passed = base < value <= 1.1 * base
        return Outcome(1, _on(title, kept), _ratio(value, base), "more than 1, up to 1.10", passed)

    def without_sinks() -> Outcome:
        base, value = full.result.value, bare.result.value
        return Outcome(1, _on(title, bare), _ratio(value, base), "at least 1.5", value >= 1.5 * base)

    return Check(1, title, [full, kept, bare], [with_sinks, without_sinks])


def beyond_training(text: str) -> Check:
    """Test 2: 12,288 tokens, half again what the model was trained for."""
    size, first = 1020, 4

    def measure(client: Client) -> Perplexity:
        return perplexity(client, texts.tokens(client, text, BEYOND), TRAINED)

    def measure_pages(client: Client) -> tuple[int, int]:
        held = pages_held(client, texts.tokens(client, text, BEYOND), output_tokens=40)
        return held, client.server_info().load.page_size

    full = Measurement(FULL_BEYOND, measure)
    kept = Measurement(window_beyond(size, first), measure)
    pages = Measurement(kept.deployment, measure_pages)

    def predictions() -> Outcome:
        base, value = full.result.value, kept.result.value
        what = _on("perplexity of tokens 8k-12k", kept)
        return Outcome(2, what, _ratio(value, base), "up to 0.85", value <= 0.85 * base)

    def memory() -> Outcome:
        held, page_size = pages.result
        most = math.ceil((size + first) / page_size) + 2
        return Outcome(2, _on("pages held at 12k", pages), str(held), f"up to {most}", 0 < held <= most)

    return Check(2, "beyond the trained length", [full, kept, pages], [predictions, memory])


def needles_in_noise(keys_per_depth: int) -> Check:
    """Test 3: numbers in 2,048 tokens of noise, at each depth so many, one at a time."""
    size, title = 508, "needles in noise at 2k"

    def measure(client: Client) -> list[Needle]:
        return needles(client, texts.NOISE, 2048, _DEPTHS, keys_per_depth)

    full, kept = (Measurement(on, measure) for on in (FULL, window(size, 4)))

    def inside() -> Outcome:
        near = [needle for needle in kept.result if (1 - needle.depth) * needle.prompt_tokens < size]
        passed = len(near) > 0 and near == [needle for needle in kept.result if needle.found]
        return Outcome(3, _on(title, kept), _count(kept.result), "those inside the window", passed)

    every = len(_DEPTHS) * keys_per_depth
    return Check(3, title, [full, kept], [_found(3, title, full, least=every), inside])


def needles_in_prose(text: str) -> Check:
    """Test 4: numbers in 4,096 tokens of the text."""
    title = "needles in prose at 4k"

    def measure(client: Client) -> list[Needle]:
        return needles(client, texts.sentences(text), 4096, _DEPTHS, keys_per_depth=2)

    full, chosen, kept = (Measurement(on, measure) for on in (FULL, topk(512), window(508, 4)))
    judges = [
        _found(4, title, full, least=6),
        _found(4, title, chosen, least=5),
        _found(4, title, kept, most=2),
    ]
    return Check(4, title, [full, chosen, kept], judges)


def coverage(text: str) -> Check:
    """Test 5: greedy tokens under each pattern whose budget covers the context."""
    context, output = 1024, 64
    title = "greedy tokens as under full"

    def measure(client: Client) -> list[int]:
        ids = texts.tokens(client, text, context - output)
        answer = client.generate(ids, max_tokens=output, ignore_eos=True, **GREEDY)
        return list(answer.token_ids)

    full = Measurement(exact(FULL), measure)
    others = [Measurement(exact(deployment), measure) for deployment in covering(context)]

    def same(other: Measurement[list[int]]) -> Outcome:
        count = sum(a == b for a, b in zip(other.result, full.result, strict=True))
        return Outcome(5, _on(title, other), f"{count} of {output}", "all", count == output)

    return Check(5, title, [full, *others], [partial(same, other) for other in others])


def decode_time(text: str) -> Check:
    """Test 6: time per output token against the length of the context, the best of three rounds."""
    contexts = (1024, 2048, 4096, 8064)
    title = "decode time from 1k to 8k"

    def measure(client: Client) -> list[DecodeTime]:
        ids = texts.tokens(client, text, contexts[-1])
        rounds = [decode_times(client, ids, contexts, output_tokens=64) for _ in range(3)]
        # The fastest is the one that the rest of the machine disturbed least.
        return [min(same, key=lambda time: time.seconds) for same in zip(*rounds, strict=True)]

    full, kept = (Measurement(on, measure) for on in (FULL, window(508, 4)))

    def growing() -> Outcome:
        passed = _growth(full.result) >= 1.2
        return Outcome(6, _on(title, full), _series(full.result), "grows 1.2 times or more", passed)

    def flat() -> Outcome:
        passed = 0.9 <= _growth(kept.result) <= 1.1  # less is as much a sign of a busy machine as more
        return Outcome(6, _on(title, kept), _series(kept.result), "0.9 to 1.1 times", passed)

    return Check(6, title, [full, kept], [growing, flat])


def _on(what: str, measurement: Measurement[Any]) -> str:
    return f"{what}, {measurement.deployment.name}"


def _found(
    test: int, title: str, needles: Measurement[list[Needle]], *, least: int = 0, most: int | None = None
) -> Callable[[], Outcome]:
    def judge() -> Outcome:
        count = sum(needle.found for needle in needles.result)
        expected = f"at least {least}" if most is None else f"at most {most}"
        passed = least <= count and (most is None or count <= most)
        return Outcome(test, _on(title, needles), _count(needles.result), expected, passed)

    return judge


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.3f} of full ({value:.2f} to {base:.2f})"


def _count(results: Sequence[Needle]) -> str:
    """``4 of 12 (4, 0, 0 at depths 0.98, 0.5, 0.1)``."""
    depths = list(dict.fromkeys(needle.depth for needle in results))
    counts = [sum(needle.found for needle in results if needle.depth == depth) for depth in depths]
    words = [", ".join(map(str, values)) for values in (counts, depths)]
    return f"{sum(counts)} of {len(results)} ({words[0]} at depths {words[1]})"


def _growth(times: Sequence[DecodeTime]) -> float:
    return times[-1].seconds / times[0].seconds


def _series(times: Sequence[DecodeTime]) -> str:
    """``1.31 times (52.1, 54.0, 58.9, 68.3 ms)``."""
    values = ", ".join(f"{time.seconds * 1e3:.1f}" for time in times)
    return f"{_growth(times):.2f} times ({values} ms)"
