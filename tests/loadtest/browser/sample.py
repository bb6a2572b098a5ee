"""Comparisons with known truth, judged as any other, for tests of the report."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from loadtest.compare.judge import judge
from loadtest.compare.presets import QUICK, WHOLE
from loadtest.compare.types import Advice, Comparison, Judgment
from loadtest.deployment import sparse
from loadtest.measuring.types import Measurement
from tests.loadtest.synthetic import Sizes, Truth, draw

LENGTHS = (1024, 4096, 8192)


def three(rounds: int = 8) -> tuple[Comparison, Judgment]:
    """A variant that is safe and one that loses answers deep in the context."""
    found = draw(
        0,
        Sizes(lengths=LENGTHS, rounds=rounds),
        topk=Truth(nats=0.012, lost=0.004, speed=1.42, memory=0.94),
        window=Truth(nats=0.028, lost=1.0, speed=2.1, memory=7.6, depths=(0.1, 0.3, 0.5)),
    )
    return found, judge(found)


def eleven() -> tuple[Comparison, Judgment]:
    """As many variants as an evening compares."""
    kinds = [
        Truth(nats=0.004 * number, lost=0.01 * (number % 4), speed=1 + 0.11 * number, memory=1 + number % 5)
        for number in range(len(WHOLE.candidates))
    ]
    truths = {one.name: kind for one, kind in zip(WHOLE.candidates, kinds, strict=True)}
    truths |= {"window": kinds[2], "topk": kinds[5]}
    found = draw(1, Sizes(candidates=WHOLE.candidates, rounds=8), **truths)
    return found, judge(found)


def oracle() -> tuple[Comparison, Judgment]:
    """Top-k beside the oracle, which selects the truly best tokens."""
    best = sparse("oracle 512", "oracle", budget=512)
    truths = {"topk": Truth(nats=0.03, speed=1.4), best.name: Truth(nats=0.005, speed=0.3)}
    found = draw(4, Sizes(candidates=(*QUICK.candidates, best)), **truths)
    return found, judge(found)


def beginning() -> tuple[Comparison, Judgment]:
    """A comparison that has just begun: no speed yet, little quality."""
    found = draw(2, Sizes(blocks=2, contexts=1, turns=3, rounds=0), topk=Truth(speed=1.4))
    return found, judge(found)


def failing() -> tuple[Comparison, Judgment]:
    """A comparison on a busy machine, with a candidate that failed and cells without figures."""
    found = draw(3, Sizes(), topk=Truth(lost=0.02, speed=1.4))
    found.failed["top-k 512"] = "its server ended with signal 9"
    found.busy = "cells of equal work differ by 30%: other processes took 41% of the processors"
    found.speed.append(Measurement("top-k 512", found.plan.loads[0].label, 10, 0, 0, 0.0, 0.0, error="gone"))
    return found, judge(found)


def hostile(text: str) -> tuple[Comparison, Judgment]:
    """A comparison with the text wherever users, models and servers may put one."""
    found, judged = three()
    first, window, topk = found.plan.candidates
    plan = replace(found.plan, text=text, own=text, own_hash=text, arguments=(text,), tasks=(text,))
    found.plan = replace(plan, candidates=(first, replace(window, name=text), topk))
    found.model["name"] = found.machine["cpu"] = found.versions["torch"] = found.failed[text] = text
    found.running[text] = {"kernel": text}
    found.busy = text
    found.answers = [replace(answer, predicted_answer=text, task=text) for answer in found.answers]
    found.memory = [replace(row, deployment=text) for row in found.memory if row.deployment == window.name]
    verdict = judged.verdicts[0]
    evidence = tuple(replace(one, where=text, note=text, measure=f"task:{text}") for one in verdict.evidence)
    gains = tuple(replace(one, deployment=text) for one in verdict.gains)
    verdict = dataclasses.replace(
        verdict, deployment=text, evidence=evidence, gains=gains, sentence=text, command=text
    )
    advice = Advice(text, (text,), text, (text, first.name), (text, first.name))
    return found, Judgment((verdict, judged.verdicts[1]), advice, (text,))
