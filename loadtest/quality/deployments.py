"""The servers that are compared."""

from __future__ import annotations

from dataclasses import replace

from loadtest.quality.types import Deployment

# What the default model was trained for, and half as much again.
TRAINED = 8192
BEYOND = 12288

FULL = Deployment("full")
_LONG = ("--max-context", str(BEYOND + 64))
# Unless the frequencies are said to stay, a model is refused any context beyond its own.
FULL_BEYOND = Deployment("full, 12k context", others=("--rope-scaling", "default", *_LONG))


def window(size: int, sinks: int) -> Deployment:
    """A sliding window at the keys' original positions."""
    options = {"window": str(size), "sinks": str(sinks)}
    return Deployment(f"window {size} + {sinks} sinks", "sliding_window", options)


def window_beyond(size: int, sinks: int) -> Deployment:
    """A sliding window at in-cache positions, which know no longest context."""
    near = window(size, sinks)
    return Deployment(
        f"{near.name}, in-cache positions", near.attention, {**near.options, "positions": "cache"}, _LONG
    )


def sparse(name: str, pattern: str, **options: int | str) -> Deployment:
    """A sparse pattern."""
    texts = {key: str(value) for key, value in options.items()}
    return Deployment(name, "sparse", {"pattern": pattern, **texts})


def topk(budget: int) -> Deployment:
    """The pages that promise most to each query, the first and the recent ones always among them."""
    return sparse(f"top-k {budget}", "topk", budget=budget)


def exact(deployment: Deployment) -> Deployment:
    """The same with weights and activations as they are.

    Where activations have 8 bits, a last bit that comes out otherwise can be rounded to another step, and the
    difference grows from layer to layer: tokens then tell nothing about attention.
    """
    return replace(deployment, others=(*deployment.others, "--weights", "float"))


def covering(context: int) -> list[Deployment]:
    """Every pattern, with a budget that covers ``context`` tokens."""
    size = str(context)
    return [
        Deployment("window", "sliding_window", {"window": size, "sinks": "4"}),
        Deployment(
            "window, in-cache", "sliding_window", {"window": size, "sinks": "4", "positions": "cache"}
        ),
        sparse("longformer", "longformer", window=context),
        sparse("segment", "segment", segment=context // 2),
        sparse("bigbird", "bigbird", block=64, window_blocks=context // 64),
        sparse("lsh", "lsh", window=context),
        sparse("top-k, dense prefill", "topk", budget=context, prefill="dense"),
        sparse("top-k, sparse prefill", "topk", budget=context, prefill="sparse"),
    ]
