"""Comparisons with known truth, drawn at random, for tests of the judgment."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from loadtest.compare.types import Comparison, Plan
from loadtest.deployment import FULL, Deployment, topk, window
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.types import Load, Measurement

LONG = 4096
TOPK, WINDOW = topk(512), window(1020, 4)
DECODE = Load(LONG, 64, cached=True)
PROMPT = Load(LONG, 64)
TPOT, TTFT = 0.005, 1.2
MODEL = {
    "name": "SmolLM2-135M-Instruct",
    "architecture": "LlamaForCausalLM",
    "parameters": 134_515_008,
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "device": "cpu",
    "context_length": 8192,
    "vocabulary_size": 49_152,
}
OPTIONS = {
    "topk": {
        "pattern": "topk",
        "sink_pages": "1",
        "recent_pages": "4",
        "prefill": "dense",
        "dense_layers": "0,1",
    },
    "sliding_window": {"positions": "original", "dense_layers": ""},
}


@dataclass(frozen=True)
class Truth:
    """A variant's true differences from full attention.

    Attributes:
        nats: that it loses per token of text.
        lost: chance that it fails a question that full attention answers.
        won: chance that it answers one that full fails.
        speed: how many times as fast it decodes.
        memory: how many times less KV cache it needs.
        depths: where it loses; everywhere if empty.
    """

    nats: float = 0.0
    lost: float = 0.0
    won: float = 0.0
    speed: float = 1.0
    memory: float = 1.0
    depths: tuple[float, ...] = ()


@dataclass
class Sizes:
    """How much was measured."""

    blocks: int = 60
    tokens: int = 16
    contexts: int = 12
    turns: int = 12
    rounds: int = 10
    noise: float = 0.03
    score: float = 0.85
    tasks: tuple[str, ...] = ("needles", "vt")
    lengths: tuple[int, ...] = (1024, LONG)
    candidates: tuple[Deployment, ...] = (FULL, WINDOW, TOPK)
    model: dict[str, object] = field(default_factory=lambda: dict(MODEL))


# Only quality, of one variant at one length. The margins are 5% of perplexity and 5 points.
ONE = {"rounds": 0, "lengths": (LONG,), "candidates": (FULL, TOPK)}
FEW = Sizes(blocks=10, tokens=4, contexts=4, turns=6, **ONE)
MANY = Sizes(blocks=24, tokens=4, contexts=16, turns=12, **ONE)
# Disagrees with full on one question in twelve, and is as good.
EQUAL = Truth(lost=0.05, won=0.05 * 0.85 / 0.15)


def draw(seed: int, sizes: Sizes, **truths: Truth) -> Comparison:
    """A comparison; ``truths`` are by name, of ``window`` and ``topk``; others are like full attention."""
    random = np.random.default_rng(seed)
    loads = tuple(replace(load, context=length) for length in sizes.lengths for load in (DECODE, PROMPT))
    plan = Plan(
        sizes.candidates, sizes.lengths, loads, sizes.tasks, "pydoc topics", "0" * 64, kv_memory=2**30
    )
    comparison = Comparison(
        plan, "2026-11-29T12:00:00+00:00", {"cpu": "abacus", "cores": 2}, model=sizes.model, spent=240.0
    )
    for one in sizes.candidates:
        pattern = one.options.get("pattern", one.attention)
        options = {**OPTIONS.get(pattern, {}), **one.options}
        comparison.running[one.name] = {"kernel": "cpu_paged", "reason": "it is there", "options": options}
    _text(comparison, random, sizes, truths)
    _answers(comparison, random, sizes, truths)
    _speed(comparison, random, sizes, truths)
    for length in sizes.lengths:
        for one in sizes.candidates:
            held = length * 22_500 / truth_of(truths, one).memory
            comparison.memory.append(Memory(one.name, length, held, int(2**30 // held)))
    return comparison


def truth_of(truths: dict[str, Truth], one: Deployment) -> Truth:
    return truths.get({WINDOW.name: "window", TOPK.name: "topk"}.get(one.name, one.name), Truth())


def _text(comparison, random, sizes, truths):
    for length in sizes.lengths:
        for block in range(sizes.blocks):
            full = random.normal(-2.5, 1.5, sizes.tokens)
            for one in sizes.candidates:
                truth = truth_of(truths, one)
                jitter = random.normal(0, 0.05, sizes.tokens) + random.normal(0, 0.02)
                own = full if one == FULL else full - truth.nats + jitter
                kl = math.nan if one == FULL else 0.01
                same = math.nan if one == FULL else 0.98
                logprobs = tuple(float(value) for value in own)
                comparison.text.append(TextBlock(one.name, length, block, length // 2, logprobs, kl, same))


def _answers(comparison, random, sizes, truths):
    for length in sizes.lengths:
        for task in sizes.tasks:
            for index in range(sizes.contexts):
                easy = random.normal(0, 0.05)
                for turn in range(sizes.turns):
                    depth = round(0.05 + 0.9 * turn / max(sizes.turns - 1, 1), 2)
                    full = bool(random.random() < sizes.score + easy)
                    for one in sizes.candidates:
                        truth = truth_of(truths, one)
                        at = not truth.depths or round(depth, 1) in truth.depths
                        lost, won = (truth.lost, truth.won) if at else (0.0, 0.0)
                        own = full
                        if one != FULL:
                            own = random.random() >= lost if full else random.random() < won
                        logprob = -4.0 if own else -9.0
                        comparison.answers.append(
                            Answer(
                                one.name, task, length, index, turn, depth, ("7654321",),
                                "7654321" if own else "no idea", float(own), logprob, 4, length - 10, 0,
                            )
                        )  # fmt: skip


def _speed(comparison, random, sizes, truths):
    began = 0.0
    for number in range(sizes.rounds):
        for load in comparison.plan.loads:
            for visit in range(2):
                for one in sizes.candidates:
                    truth = truth_of(truths, one)
                    covered = load.context <= 1024 and one == WINDOW
                    speed = 1.0 if covered else truth.speed
                    tpot = TPOT / speed * math.exp(random.normal(0, sizes.noise))
                    ttft = TTFT * load.context / LONG * math.exp(random.normal(0, sizes.noise))
                    figures = {"tpot": tpot, "output_rate": 1 / tpot}
                    if not load.cached:
                        figures["ttft"] = ttft
                    comparison.speed.append(
                        Measurement(one.name, load.label, number, visit, 0, began, 0.5, figures)
                    )
                    began += 0.5
