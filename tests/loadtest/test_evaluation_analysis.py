"""Losses from rows whose truth is known."""

import math
import random
from dataclasses import replace

import pytest

from loadtest.compare import analysis
from loadtest.compare.analysis import Depth
from loadtest.compare.effective import Effective, effective_length
from loadtest.compare.phrases import effective_words
from loadtest.compare.turns import by_turn
from loadtest.compare.types import Comparison, Plan
from loadtest.deployment import Deployment
from loadtest.evaluation.types import Answer, TextBlock

FULL, OWN = "full", "own"


def comparison(answers=(), text=(), contexts=(1024, 4096)):
    plan = Plan(
        candidates=(Deployment(FULL), Deployment(OWN)),
        contexts=contexts,
        loads=(),
        tasks=("easy", "hard"),
        text="made up",
        text_hash="",
    )
    return Comparison(plan, "", {}, answers=list(answers), text=list(text))


def answers(task, length, full, own, turns=1, depth=None, logprobs=(-1.0, -1.0)):
    """Rows of both deployments with these scores, ``turns`` of them about each context."""
    return [
        Answer(
            name,
            task,
            length,
            *divmod(number, turns),
            depth(number) if depth else None,
            ("answer",),
            score=score,
            logprob=logprob,
            target_tokens=2,
        )
        for name, scores, logprob in zip((FULL, OWN), (full, own), logprobs, strict=True)
        for number, score in enumerate(scores)
    ]


def blocks(name, losses, length=1024, tokens=8):
    """Blocks, a slice each, whose every token is less likely by the block's loss than under full, e^-2."""
    return [TextBlock(name, length, n, 512, (-2.0 - loss,) * tokens) for n, loss in enumerate(losses)]


def test_blocks_of_one_slice_that_lose_alike_widen_the_interval():
    rng = random.Random(2)
    losses = [0.02 * number + rng.gauss(0, 0.005) for number in range(4) for _ in range(8)]
    rows = blocks(FULL, [0.0] * 32) + blocks(OWN, losses)
    apart = analysis.text_loss(comparison(text=rows), OWN, 1024)
    slices = [replace(row, start=512 + row.block % 8 * 64) for row in rows]
    together = analysis.text_loss(comparison(text=slices), OWN, 1024)
    assert (together.value, together.count) == (apart.value, apart.count)
    assert together.high - together.low > 2 * (apart.high - apart.low)
    alone = analysis.text_loss(comparison(text=[row for row in slices if row.block < 8]), OWN, 1024)
    assert (alone.count, alone.claimed) == (8, False), "one slice does not tell how slices differ"


def lost(rows, *tasks):
    return analysis.points_lost(analysis.task_pairs(comparison(rows), OWN, tasks, 1024), 0.95)


def test_text_loss_is_the_ratio_of_perplexities_less_one():
    rng = random.Random(1)
    losses = [rng.gauss(0.04, 0.02) for _ in range(40)]
    rows = blocks(FULL, [0.0] * 40) + blocks(OWN, losses)
    loss = analysis.text_loss(comparison(text=rows), OWN, 1024)
    own, full = (analysis.perplexity(comparison(text=rows), name, 1024) for name in (OWN, FULL))
    assert full == pytest.approx(math.exp(2))
    assert loss.value == pytest.approx(own / full - 1)
    assert loss.low < math.expm1(0.04) < loss.high
    assert loss.high - loss.low == pytest.approx(2 * 2.02 * 0.02 / math.sqrt(40), rel=0.2)
    assert loss.count == 40


def test_blocks_count_where_both_have_them_and_the_later_row_counts():
    rows = blocks(FULL, [0.0] * 8) + blocks(OWN, [9.0] * 8) + blocks(OWN, [0.1] * 6)
    rows[15] = TextBlock(OWN, 1024, 7, 512, error="refused")
    loss = analysis.text_loss(comparison(text=rows), OWN, 1024)
    assert loss.count == 7
    assert loss.value == pytest.approx(math.expm1((6 * 0.1 + 9) / 7))
    assert analysis.errors(comparison(text=rows), OWN) == ["refused"]
    assert analysis.text_loss(comparison(text=rows), OWN, 4096).count == 0


def test_blocks_of_different_tokens_are_not_compared():
    rows = [*blocks(FULL, [0.0]), *blocks(OWN, [0.0], tokens=7)]
    with pytest.raises(ValueError, match="block 0 at 1024 tokens differs between 'full' and 'own'"):
        analysis.text_loss(comparison(text=rows), OWN, 1024)


@pytest.mark.parametrize(
    ("scores", "informative"),
    [
        ([1.0] * 20, True),
        ([1.0] * 7 + [0.0] * 13, True),
        ([1.0] * 5 + [0.0] * 15, False),
        ([1.0, 1.0, 0.0], False),  # too few to tell from luck
        ([0.0] * 20, False),
        ([0.35] * 20, True),
    ],
)
def test_a_task_is_informative_where_full_can_do_it(scores, informative):
    rows = answers("easy", 1024, scores, scores)
    assert analysis.is_informative(comparison(rows), "easy", 1024) is informative


def test_scores_are_pooled_only_over_informative_tasks():
    rows = answers("easy", 1024, [1.0] * 20, [1.0] * 15 + [0.0] * 5)
    rows += answers("hard", 1024, [0.0] * 20, [0.5] * 20)
    rows += answers("own", 1024, [1.0] * 20, [0.0] * 20)
    assert [lost(rows, task).value for task in ("easy", "hard")] == [0.25, -0.5]
    pooled = lost(rows, *analysis.informative_tasks(comparison(rows), 1024))
    assert pooled.value == 0.25
    assert 0 < pooled.low < 0.25 < pooled.high < 0.5
    assert analysis.own_loss(comparison(rows), OWN).value == 1


def test_questions_about_one_context_are_not_independent():
    """The loss of whole contexts is known less well than that of as many questions anywhere."""
    full = [1.0] * 80
    whole = answers("easy", 1024, full, [0.0] * 20 + [1.0] * 60, turns=10)
    spread = answers("easy", 1024, full, [0.0, 1.0, 1.0, 1.0] * 20, turns=10)
    wide, narrow = (lost(rows, "easy") for rows in (whole, spread))
    assert wide.value == narrow.value == 0.25
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    alone = answers("easy", 1024, full, [0.0] * 40 + [1.0] * 40, turns=80)
    assert not lost(alone, "easy").claimed


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_interval_of_scores_holds_the_truth(spread):
    """Of many simulated runs with 6 contexts of 12 questions, whose difficulty may differ, all but a few."""
    rng = random.Random(3)
    held = 0
    for _ in range(300):
        own = []
        for _ in range(6):
            loss = 0.3 + rng.choice((-spread, spread))
            own += [float(rng.random() >= loss) for _ in range(12)]
        rows = answers("easy", 1024, [1.0] * 72, own, turns=12)
        loss = lost(rows, "easy")
        held += loss.low <= 0.3 <= loss.high
    assert held >= 275  # 285 of 300 are meant


def test_log_probabilities_are_per_token_of_the_answer():
    rows = answers("hard", 1024, [0.0] * 8, [0.0] * 8, logprobs=(-4.0, -4.6))
    pairs = analysis.task_pairs(comparison(rows), OWN, ["hard"], 1024)
    loss = analysis.nats_lost(pairs, 0.95)
    assert (loss.value, loss.low, loss.high) == pytest.approx((0.3, 0.3, 0.3))
    unmeasured = answers("hard", 1024, [0.0] * 8, [0.0] * 8, logprobs=(math.nan, -1.0))
    pairs = analysis.task_pairs(comparison(unmeasured), OWN, ["hard"], 1024)
    assert len(pairs) == 8
    assert analysis.nats_lost(pairs, 0.95).count == 0


def test_agreement_is_asked_where_no_answer_is_known():
    rows = answers("own", 700, [math.nan] * 10, [0.9] * 10) + answers("own", 900, [1.0] * 4, [0.5] * 4)
    assert analysis.agreement_loss(comparison(rows), OWN).value == pytest.approx(0.1)
    assert analysis.own_loss(comparison(rows), OWN).value == 0.5
    assert analysis.tasks_at(comparison(rows), 700) == ()


@pytest.mark.parametrize(
    ("own", "length"),
    [
        ({1024: 1.0, 4096: 0.95, 8192: 0.9}, 8192),
        ({1024: 1.0, 4096: 0.9, 8192: 0.5}, 4096),
        ({1024: 1.0, 4096: 0.5, 8192: 1.0}, 1024),
        ({1024: 0.5, 4096: 1.0, 8192: 1.0}, 0),
        ({1024: 1.0, 4096: 0.9}, None),  # what was not asked yet was not failed
    ],
)
def test_effective_length_is_held_against_full_at_its_shortest(own, length):
    contexts = (1024, 4096, 8192)
    rows = [row for at, score in own.items() for row in answers("easy", at, [1.0] * 20, [score] * 20)]
    rows += answers("hard", 1024, [0.0] * 20, [0.0] * 20)
    found = effective_length(comparison(rows, contexts=contexts), OWN)
    assert (found.length if found else None) == length


def test_effective_length_needs_an_informative_task():
    rows = answers("hard", 1024, [0.0] * 20, [0.0] * 20)
    assert effective_length(comparison(rows), OWN) is None


def test_an_effective_length_has_an_interval():
    def at(length, score, count):
        right = round(score * count)
        return answers("easy", length, [1.0] * count, [1.0] * right + [0.0] * (count - right))

    def found(count):
        rows = at(1024, 1.0, count) + at(4096, 0.875, count) + at(8192, 0.8, count)
        return effective_length(comparison(rows, contexts=(1024, 4096, 8192)), OWN)

    assert found(40) == Effective(4096, 1024, 8192), "0.875 and 0.8 of 40 may both be 0.85"
    assert found(4000) == Effective(4096, 4096, 4096)
    rows = at(1024, 0.2, 200) + at(4096, 1.0, 200)
    assert effective_length(comparison(rows), OWN) == Effective(0, 0, 0)
    few = [0.0, 1.0] * 6
    of_full = effective_length(comparison(answers("easy", 1024, few, few), contexts=(1024,)), FULL)
    assert of_full == Effective(1024, 1024, 1024), "it surely keeps its own score"
    assert effective_words(4096, 1024, 8192) == "4k (1k to 8k)"
    assert (effective_words(0, 0, 1024), effective_words(4096, 4096, 4096)) == ("none (none to 1k)", "4k")


def test_losses_of_only_later_questions_are_told():
    own = [1.0, 0.0, 0.0, 1.0] * 8
    rows = answers("easy", 1024, [1.0] * 32, own, turns=4)
    turns = by_turn(analysis.task_pairs(comparison(rows), OWN, ["easy"], 1024), 0.95)
    assert (turns.first, turns.first_full, turns.first_own) == (8, 8.0, 8.0)
    assert (turns.later, turns.later_full, turns.later_own) == (24, 24.0, 8.0)
    assert turns.difference.value == pytest.approx(2 / 3)
    assert turns.fails_later
    few = by_turn(analysis.task_pairs(comparison(rows[:20] + rows[32:52]), OWN, ["easy"], 1024), 0.95)
    assert (few.first, few.difference.claimed, few.fails_later) == (5, False, False), "too few contexts"
    alike = answers("easy", 1024, [1.0] * 32, [0.0] * 32, turns=4)
    assert not by_turn(analysis.task_pairs(comparison(alike), OWN, ["easy"], 1024), 0.95).fails_later
    alone = answers("easy", 1024, [1.0] * 8, [0.0] * 8)
    assert by_turn(analysis.task_pairs(comparison(alone), OWN, ["easy"], 1024), 0.95) is None


def test_losses_are_told_by_depth():
    def depth(number):
        return (number % 2) / 2 + 0.12

    rows = answers("easy", 1024, [1.0] * 20, [0.0, 1.0] * 10, depth=depth)
    assert analysis.by_depth(comparison(rows), OWN, 1024, ["easy"]) == [
        Depth(0.1, 10, 10.0, 0.0),
        Depth(0.6, 10, 10.0, 10.0),
    ]
