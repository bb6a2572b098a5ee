"""The advice on which variant to deploy, on comparisons with known truth."""

from collections import Counter
from dataclasses import replace

import pytest

from loadtest.compare.judge import judge
from loadtest.deployment import Deployment
from tests.loadtest.synthetic import DECODE, FEW, FULL, LONG, MANY, TOPK, WINDOW, Sizes, Truth, draw
from tests.loadtest.usual import text

# Milliseconds per token of the quick form on a machine in five states: full and a window at 1k, where both do
# the same, full and top-k at 4k.
WEATHER = [
    (4.46, 3.70, 5.46, 4.93),
    (3.53, 3.58, 5.98, 4.57),
    (411, 4.03, 19.8, 18.9),
    (54, 2018, 5.47, 82.6),
    (5.64, 7.88, 145, 13.0),
]


def timed(rows, seed=1):
    """A comparison whose rounds take these times, as (full, window at 1k, full, top-k at 4k)."""
    drawn = draw(seed, replace(MANY, rounds=len(rows), lengths=(1024, LONG), candidates=(FULL, WINDOW, TOPK)))
    columns = {(FULL.name, 1024): 0, (WINDOW.name, 1024): 1, (FULL.name, LONG): 2, (TOPK.name, LONG): 3}
    labels = {load.label: load.context for load in drawn.plan.loads}
    drawn.speed = [
        replace(
            cell,
            figures={"tpot": rows[cell.round][column] / 1e3, "output_rate": 1e3 / rows[cell.round][column]},
        )
        for cell in drawn.speed
        if (column := columns.get((cell.deployment, labels[cell.load]))) is not None
    ]
    return drawn


@pytest.mark.parametrize("row", WEATHER)
def test_one_round_in_any_weather_proves_no_gain(row):
    judgment = judge(timed([row]))
    assert judgment.advice.winner == FULL.name
    assert not any(gain.different for verdict in judgment.verdicts for gain in verdict.gains)


def test_all_weathers_together_prove_none_either():
    judgment = judge(timed([*WEATHER, *WEATHER]))
    assert judgment.advice.winner == FULL.name
    assert not any(gain.different for verdict in judgment.verdicts for gain in verdict.gains)


def test_noise_is_no_gain_and_a_gain_is_found():
    speeds = Sizes(
        blocks=8, tokens=2, contexts=8, turns=10, lengths=(LONG,), candidates=(FULL, TOPK), noise=0.1
    )
    winners = Counter(judge(draw(seed, speeds)).advice.winner for seed in range(20))
    assert winners == {FULL.name: 20}
    assert judge(draw(1, speeds, topk=Truth(speed=1.3))).advice.winner == TOPK.name


def test_a_gain_that_is_certain_and_small_is_not_worth_a_change():
    sizes = replace(MANY, rounds=20, noise=0.005)
    judgment = judge(draw(1, sizes, topk=Truth(speed=1.03)))
    assert judgment.advice.winner == FULL.name
    assert any(gain.different for gain in judgment.verdicts[0].gains)


def test_between_equal_gains_the_first_token_decides():
    faster = Deployment("other", "sliding_window", {"window": "100", "sinks": "4"})
    sizes = replace(MANY, rounds=10, candidates=(FULL, TOPK, faster))
    drawn = draw(1, sizes, topk=Truth(speed=1.31), other=Truth(speed=1.3))
    assert judge(drawn).advice.winner in (TOPK.name, "other")
    for slower, winner in ((TOPK.name, "other"), ("other", TOPK.name)):
        slow = [
            replace(cell, figures={**cell.figures, "ttft": 2 * cell.figures["ttft"]})
            if cell.deployment == slower and "ttft" in cell.figures
            else cell
            for cell in drawn.speed
        ]
        assert judge(replace(drawn, speed=slow)).advice.winner == winner


def test_under_many_users_tokens_per_second_decide():
    drawn = draw(1, replace(MANY, rounds=10), topk=Truth(speed=1.3))
    users = replace(DECODE, concurrency=8)
    drawn.plan = replace(drawn.plan, loads=(users,))
    cells = [replace(cell, load=users.label) for cell in drawn.speed if cell.load == DECODE.label]
    drawn.speed = [replace(cell, figures={**cell.figures, "tpot": 0.005}) for cell in cells]
    assert judge(drawn).advice.winner == TOPK.name
    drawn.speed = [replace(cell, figures={**cell.figures, "output_rate": 200.0}) for cell in cells]
    assert judge(drawn).advice.winner == FULL.name


def test_pareto_fronts():
    others = tuple(Deployment(name, "sliding_window", {"window": name}) for name in ("fast", "slow", "small"))
    sizes = replace(MANY, rounds=10, noise=0.01, candidates=(FULL, TOPK, *others))
    truths = {
        "topk": Truth(speed=1.3),
        "fast": Truth(nats=0.1, speed=1.6, memory=2),
        "slow": Truth(nats=0.2, speed=1.2, memory=1.5),
        "small": Truth(nats=0.3, speed=0.9, memory=4),
    }
    drawn = draw(1, sizes, **truths)
    advice = judge(drawn).advice
    assert advice.quality_speed == (TOPK.name, "fast"), "slow loses more than fast, full is as good as top-k"
    assert advice.quality_memory == (FULL.name, TOPK.name, "fast", "small")
    without = judge(replace(drawn, busy="too busy")).advice
    assert (without.quality_speed, without.quality_memory) == ((), advice.quality_memory)
    fewer = judge(replace(drawn, failed={"fast": "it fell over"})).advice
    assert fewer.quality_speed == (TOPK.name,)


def test_of_several_users_tokens_per_second_are_told_for_each_gibibyte_that_they_hold():
    drawn = draw(1, replace(MANY, rounds=10, lengths=(LONG,)), topk=Truth(speed=1.3, memory=4.0))
    users = replace(DECODE, concurrency=8)
    drawn.plan = replace(drawn.plan, loads=(users, drawn.plan.loads[0]))
    drawn.speed += [replace(cell, load=users.label) for cell in drawn.speed if cell.load == DECODE.label]
    judgment = judge(drawn)
    found = judgment.verdicts[0].gains
    gains = [gain for gain in found if gain.figure == "memory_rate"]
    assert [gain.load for gain in gains] == [users.label], "of one user nothing follows for more of them"
    (rate,) = [gain for gain in found if (gain.figure, gain.load) == ("output_rate", users.label)]
    held = 8 * LONG * 22_500 / 2**30  # GiB
    assert gains[0].full.value == pytest.approx(rate.full.value / held)
    assert gains[0].own.value == pytest.approx(rate.own.value / (held / 4))
    assert gains[0].ratio.value == pytest.approx(4 * rate.ratio.value)
    assert (gains[0].ratio.low, gains[0].ratio.high) == pytest.approx(
        (4 * rate.ratio.low, 4 * rate.ratio.high)
    )
    shown = " ".join(text(drawn, 100).split())
    assert "Tokens per second per GiB of KV cache in use, 4k, 8 users, cached prompts: full " in shown
    assert (
        "Pareto fronts at 4k, every server with as much KV memory: quality against speed: full, top-k "
        "512; against KV memory of a sequence: full, top-k 512" in shown
    )
    without = judge(replace(drawn, memory=[]))
    assert not [gain for gain in without.verdicts[0].gains if gain.figure == "memory_rate"]


def test_only_full_is_judged():
    judgment = judge(draw(1, replace(FEW, candidates=(FULL,), rounds=6)))
    assert judgment.verdicts == ()
    assert judgment.advice.winner == FULL.name
