"""A comparison as reports see it: three variants with one outcome each, and more of them on request."""

from __future__ import annotations

import dataclasses
import math
import random

from loadtest.compare.types import (
    Advice,
    Comparison,
    Evidence,
    Gain,
    Judgment,
    Outcome,
    Plan,
    Verdict,
)
from loadtest.deployment import FULL, WHOLE, Deployment, topk, window
from loadtest.evaluation.types import Answer, Memory
from loadtest.measuring.types import Interval, Load

CONTEXTS = (1024, 4096, 8192)
DEPTHS = (0.0, 0.1, 0.35, 0.5, 0.65, 0.9, 1.0)
CANDIDATES = (FULL, window(1020, 4), topk(512), Deployment("bigbird", "sparse", {"pattern": "bigbird"}))

_MIB = 2**20
_FULL_TPOT = {1024: 0.0044, 4096: 0.0056, 8192: 0.0089}
# Speed per token, KV bytes and loss of perplexity at the longest context; depths at which answers are lost.
_KIND = {
    "sliding_window": (2.1, 7.6, 0.031, (0.1, 0.35, 0.5, 0.65)),
    "topk": (1.42, 0.94, 0.022, ()),
    "bigbird": (1.3, 1.0, 0.052, (0.35,)),
}


def comparison(candidates: tuple[Deployment, ...] = CANDIDATES, seed: int = 0) -> tuple[Comparison, Judgment]:
    """Made-up measurements that look like real ones, and what follows from them."""
    drawn = random.Random(seed)
    loads = tuple(
        Load(context, 64, users, requests=4, cached=True) for context in CONTEXTS for users in (1, 8)
    )
    plan = Plan(
        candidates,
        CONTEXTS,
        loads,
        ("niah_single_1", "niah_multikey_2", "vt"),
        "pydoc_data.topics",
        "5f1d6e",
        kv_memory=8 << 30,
        arguments=("--threads", "2"),
    )
    found = Comparison(
        plan,
        "2026-11-29T17:00:00+00:00",
        {"cpu": "AMD EPYC 9B45", "cores": 2, "memory_bytes": 8 << 30, "system": "Linux-6.1"},
        {"longspan": "0.1.0", "torch": "2.13.0"},
        {"name": "SmolLM2-135M-Instruct", "parameters": 134515008, "dtype": "float32", "kv_dtype": "float16"},
        {each.name: {"kernel": "cpu_paged", "reason": "first that fits"} for each in candidates},
        budget=300.0,
        spent=281.0,
    )
    for candidate in candidates:
        _, smaller, _, lost = _kind(candidate)
        for length in CONTEXTS:
            full = length * 22.5 * _MIB / 1024
            own = min(full, 23.2 * _MIB) if smaller > 2 else full / smaller
            found.memory.append(Memory(candidate.name, length, own, int(plan.kv_memory / own)))
            for task in plan.tasks:
                for index, depth in enumerate(DEPTHS * 2):
                    score = float(not (depth in lost and length > 1024))
                    found.answers.append(
                        Answer(candidate.name, task, length, index, 0, depth, ("4711",), score=score)
                    )
    verdicts = tuple(_verdict(candidate, plan, drawn) for candidate in candidates[1:])
    safe = [verdict.deployment for verdict in verdicts if verdict.outcome is Outcome.SAFE]
    winner = next((each for each in candidates if safe and each.name == safe[-1]), candidates[0])
    advice = Advice(
        winner.name,
        (
            f"Deploy {winner.name}: at 8k with 1 user and cached prompts it is 1.4 times faster per token, "
            "and at 95% confidence the text pydoc_data.topics and the tasks lose less than the margins at "
            "1k, 4k and 8k.",
            "It needs 6% more KV memory than full.",
        ),
        winner.command,
        (FULL.name, winner.name, candidates[1].name),
        (FULL.name, candidates[1].name),
    )
    told = ("vt at 8k: full attention itself answers 2 of 20 right.",)
    return found, Judgment(verdicts, advice, told)


def hostile(text: str) -> tuple[Comparison, Judgment]:
    """The same, with the text wherever users, models and servers may put one."""
    name = f"{text} window"
    found, judged = comparison((FULL, dataclasses.replace(window(1020, 4), name=name)))
    found.plan = dataclasses.replace(found.plan, text=text, own=text, own_hash=text, arguments=(text,))
    found.model["name"] = found.machine["cpu"] = found.versions["torch"] = found.failed[text] = text
    found.running[name] = {"kernel": text}
    found.busy = text
    found.answers = [
        dataclasses.replace(answer, predicted_answer=text, task=text) for answer in found.answers
    ]
    verdict = judged.verdicts[0]
    evidence = tuple(
        dataclasses.replace(one, where=text, note=text, measure=f"task:{text}") for one in verdict.evidence
    )
    gains = tuple(dataclasses.replace(one, load=text) for one in verdict.gains)
    verdict = dataclasses.replace(verdict, evidence=evidence, gains=gains, sentence=text, command=text)
    advice = dataclasses.replace(judged.advice, sentences=(text,), command=text, winner=name)
    return found, Judgment((verdict,), advice, (text,), text)


def eleven() -> tuple[Comparison, Judgment]:
    """As many variants as an evening compares."""
    return comparison(WHOLE, seed=3)


def _kind(candidate: Deployment) -> tuple[float, float, float, tuple[float, ...]]:
    if candidate == FULL:
        return 1.0, 1.0, 0.0, ()
    return _KIND.get(candidate.options.get("pattern", candidate.attention), (1.1, 1.0, 0.09, (0.5,)))


def _verdict(candidate: Deployment, plan: Plan, drawn: random.Random) -> Verdict:
    faster, smaller, worse, lost = _kind(candidate)
    faster, worse = faster * drawn.uniform(0.9, 1.1), worse * drawn.uniform(0.8, 1.2)
    evidence, gains = [], []
    for length in CONTEXTS:
        grown = CONTEXTS.index(length) / 2
        missed = len(lost) / len(DEPTHS) if length > 1024 else 0.0
        evidence.append(_test(candidate, "text", length, "perplexity", worse * grown, 0.012, 0.05, 14.3))
        evidence.append(_test(candidate, "tasks", length, "score", missed, 0.03, 0.05, 0.95))
        for task in plan.tasks:
            where = f"at depth {lost[0]}: 0 of 6 found where full finds 6" if lost and missed else ""
            test = _test(candidate, f"task:{task}", length, "score", missed, 0.09, 0.05, 0.98)
            evidence.append(dataclasses.replace(test, decides=False, where=where))
        for load in plan.loads:
            if load.context == length:
                ratio = 1 + (faster - 1) * grown
                gains += _speed(candidate, load, ratio, drawn)
        full = Interval(length * 22.5 * _MIB / 1024, count=1)
        own = min(full.value, 23.2 * _MIB) if smaller > 2 else full.value / smaller
        ratio = Interval(full.value / own, count=1)
        gains.append(Gain(candidate.name, "", length, "bytes", full, Interval(own, count=1), ratio))
    outcomes = {one.outcome for one in evidence if one.decides}
    outcome = next((one for one in (Outcome.UNSAFE, Outcome.UNKNOWN) if one in outcomes), Outcome.SAFE)
    sentence = f"{faster:.1f} times faster per token at 8k, perplexity {worse:+.1%}"
    sentence += f", loses answers at depth {', '.join(map(str, lost))}" if lost else ""
    effective = 1024 if lost else 8192
    return Verdict(
        candidate.name,
        outcome,
        tuple(evidence),
        tuple(gains),
        effective,
        False,
        sentence + ".",
        candidate.command,
    )


def _test(
    candidate: Deployment,
    measure: str,
    length: int,
    unit: str,
    value: float,
    half: float,
    margin: float,
    full: float,
) -> Evidence:
    loss = Interval(value, value - half, value + half, 42)
    outcome = Outcome.UNKNOWN
    if loss.high < margin:
        outcome = Outcome.SAFE
    elif loss.low > margin:
        outcome = Outcome.UNSAFE
    own = full * (1 + value) if unit == "perplexity" else full - value
    more = 17 if outcome is Outcome.UNKNOWN else None
    return Evidence(candidate.name, measure, length, unit, loss, margin, full, own, outcome, more)


def _speed(candidate: Deployment, load: Load, ratio: float, drawn: random.Random) -> list[Gain]:
    base = _FULL_TPOT[load.context] * (1 + 0.3 * (load.concurrency - 1))
    wide = drawn.uniform(0.02, 0.09)

    def around(value: float) -> Interval:
        return Interval(value, value * (1 - wide), value * (1 + wide), 9)

    same = ratio == 1.0
    tpot = Gain(
        *(candidate.name, load.label, load.context, "tpot"),
        around(base),
        around(base / ratio),
        around(ratio),
        same,
    )
    rate = dataclasses.replace(
        tpot,
        figure="output_rate",
        full=around(load.concurrency / base),
        own=around(load.concurrency / base * ratio),
    )
    ttft = dataclasses.replace(
        tpot,
        figure="ttft",
        full=around(0.031),
        own=around(0.031),
        ratio=Interval(1.0, math.nan, math.nan, 3),
    )
    return [tpot, ttft, rate]
