"""Which attention variants to compare."""

from __future__ import annotations

import shlex
from dataclasses import replace

from loadtest.compare.types import Candidate
from loadtest.quality.deployments import FULL, sparse, topk, window
from loadtest.quality.types import Deployment

_EXACT = ("full", "flash", "xformers")


def candidate(deployment: Deployment) -> Candidate:
    """A deployment as a candidate.

    A top-k pattern leaves prompts alone; its perplexity is measured with ``prefill=sparse``, under which
    every token of the text is predicted from what the pattern chooses.
    """
    options = dict(deployment.options)
    predicting = deployment
    if options.get("pattern") == "topk" and options.get("prefill", "dense") == "dense":
        predicting = replace(deployment, options={**options, "prefill": "sparse"})
    return Candidate(deployment, predicting, exact=deployment.attention in _EXACT)


def parse(text: str) -> Candidate:
    """A candidate from ``"sliding_window window=512 sinks=4"``.

    Raises:
        ValueError: it is not of that form.
    """
    words = shlex.split(text)
    if not words or "=" in words[0] or any("=" not in word for word in words[1:]):
        raise ValueError(
            f"{text!r} is no candidate; write a backend and its options, like 'sliding_window window=512'"
        )
    options = dict(word.split("=", 1) for word in words[1:])
    return candidate(Deployment(text.strip(), words[0], options))


QUICK: tuple[Candidate, ...] = tuple(
    candidate(deployment) for deployment in (FULL, window(1020, 4), topk(512))
)
"""What a first look compares."""

WHOLE: tuple[Candidate, ...] = tuple(
    candidate(deployment)
    for deployment in (
        FULL,
        window(508, 4),
        window(1020, 4),
        window(2044, 4),
        topk(256),
        topk(512),
        topk(1024),
        sparse("longformer", "longformer"),
        sparse("segment 512", "segment"),
        sparse("bigbird", "bigbird"),
        sparse("lsh", "lsh"),
    )
)
"""What an evening compares."""
