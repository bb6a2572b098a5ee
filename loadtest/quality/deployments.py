"""The servers that are compared."""

from __future__ import annotations

from dataclasses import replace

from loadtest.deployment import Deployment, sparse, window

# What the default model was trained for, and half as much again.
TRAINED = 8192
BEYOND = 12288

_LONG = ("--max-context", str(BEYOND + 64))
# Unless the frequencies are said to stay, a model is refused any context beyond its own.
FULL_BEYOND = Deployment("full, 12k context", others=("--rope-scaling", "default", *_LONG))


def window_beyond(size: int, sinks: int) -> Deployment:
    """A sliding window at in-cache positions, which know no longest context."""
    near = window(size, sinks)
    return Deployment(
        f"{near.name}, in-cache positions", near.attention, {**near.options, "positions": "cache"}, _LONG
    )


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
        sparse("oracle", "oracle", budget=context, prefill="sparse"),
    ]
