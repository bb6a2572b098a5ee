"""The judgment's exact sentences, on comparisons with plain figures."""

import re
from dataclasses import replace

from loadtest.compare.judge import judge
from loadtest.compare.phrases import amount, setting
from loadtest.compare.types import Evidence, Margins, Outcome
from loadtest.compare.words import more_words, settling
from loadtest.deployment import sparse
from loadtest.measuring.types import Interval
from loadtest.report.compare import render
from tests.loadtest.synthetic import DECODE, FULL, LONG, TOPK, WINDOW, draw
from tests.loadtest.usual import SIZES, plain, text


def test_the_winner(usual):
    advice = judge(usual).advice
    assert advice.winner == TOPK.name
    assert advice.command == TOPK.command
    arguments = ("--model", "my models/llama", "--threads", "4")
    own = judge(replace(usual, plan=replace(usual.plan, arguments=arguments)))
    serve = "longspan serve --model 'my models/llama' --threads 4 --attention"
    assert (
        own.advice.command == f"{serve} sparse --attention-option pattern=topk --attention-option budget=512"
    )
    assert own.verdicts[0].command.startswith(f"{serve} sliding_window"), (
        "what was measured is what is served"
    )
    assert list(advice.sentences) == [
        "Deploy top-k 512: at 4k, 1 user, cached prompts it decodes 1.25 times as fast as full attention "
        "(1.24 to 1.26).",
        "It is safe within the margins at 1k and 4k: perplexity at most 1.01 times full's "
        "(margin 1.05) and at most 1.2 of 100 points lost in tasks (margin 5).",
        "Its tests had 24 contexts or more: a loss that strikes fewer than 15% of contexts could have gone "
        "unseen.",
        "It costs: at 4k it has a KV cache 1.06 times as large.",
        "Its KV cache grows with the context: 8 MiB at 1k and 34 MiB at 4k per sequence.",
        "At 4k, 1 user, new prompts it decodes 1.25 times as fast (1.24 to 1.26).",
        "1 GiB of KV cache holds 30 sequences of 4k under top-k 512, 32 under full attention.",
        "window 1020 + 4 sinks decodes 2.00 times as fast (1.98 to 2.02), but is not safe.",
        'This holds for SmolLM2-135M-Instruct with the text "pydoc topics" at 1k and 4k under "4k, 1 user, '
        'cached prompts" and "4k, 1 user, new prompts" on abacus, at 95% confidence.',
    ]


def test_the_variants(usual):
    window, topk = judge(usual).verdicts
    numbers = re.sub(
        r"(loses|100 points in tasks at 4k|full finds) ([\d.(]+( to [\d.]+)?)", r"\1 N", window.sentence
    )
    assert numbers == (
        "window 1020 + 4 sinks: not safe: loses N of 100 points in tasks at 4k N; margin 5), at depth 0.1 to "
        "0.3: 0 of 128 found where full finds N At 4k it decodes 2.00 times as fast (1.98 to 2.02) and has a "
        "KV cache 4.00 times smaller."
    )
    assert topk.sentence == (
        "top-k 512: safe: perplexity at most 1.01 times full's (margin 1.05) and at most 1.2 of 100 points "
        "lost in tasks (margin 5). At 4k it decodes 1.25 times as fast (1.24 to 1.26). It costs: at 4k it "
        "has a KV cache 1.06 times as large."
    )
    assert (window.effective, topk.effective) == (1024, LONG)


def test_losses_of_only_later_questions_are_in_the_sentence(usual):
    """SCBench's finding: what evicts for the first question about a context fails from the second on."""
    full = {
        (row.task, row.length, row.index, row.turn): row.score
        for row in usual.answers
        if row.deployment == FULL.name
    }
    answers = [
        replace(row, score=0.0 if row.turn else full[row.task, row.length, row.index, row.turn], depth=None)
        if row.deployment == WINDOW.name
        else replace(row, depth=None)
        for row in usual.answers
    ]
    verdict = judge(replace(usual, answers=answers)).verdicts[0]
    (test,) = [one for one in verdict.evidence if (one.measure, one.length) == ("tasks", LONG)]
    turns = test.turns
    assert (turns.first, turns.later, turns.later_own) == (32, 320, 0.0)
    assert turns.first_own == turns.first_full
    assert turns.difference.low > 0
    said = (
        f"from the second question about a context on: 0 of 320 found where full finds "
        f"{turns.later_full:.0f}, by the first {turns.first_own:.0f} of 32 where full finds "
        f"{turns.first_full:.0f}"
    )
    assert test.where == said
    assert said in verdict.sentence
    assert not any("second question" in one.where for one in judge(usual).verdicts[0].evidence), (
        "what is lost by depth is lost by all turns"
    )


def test_prefill_gains_are_not_claimed_of_patterns_with_dense_prompts(usual):
    faster = [
        replace(cell, figures={**cell.figures, "ttft": cell.figures["ttft"] / 2})
        if cell.deployment == TOPK.name and "ttft" in cell.figures
        else cell
        for cell in usual.speed
    ]
    judgment = judge(replace(usual, speed=faster))
    said = " ".join([*judgment.advice.sentences, *(verdict.sentence for verdict in judgment.verdicts)])
    assert "first token" not in said
    (gain,) = [one for one in judgment.verdicts[1].gains if (one.figure, one.context) == ("ttft", LONG)]
    assert gain.equal_work
    assert gain.ratio.low > 1.9


def test_a_machine_that_is_too_busy(usual):
    busy = "this machine is too busy to tell speeds apart: another process used 48%; end other programs"
    judgment = judge(replace(usual, busy=busy))
    assert judgment.advice.winner == judgment.advice.command == ""
    assert judgment.advice.sentences == (
        f"T{busy[1:]}.",
        "The verdicts on quality stand: safe: top-k 512; not safe: window 1020 + 4 sinks.",
        'This holds for SmolLM2-135M-Instruct with the text "pydoc topics" at 1k and 4k, at 95% confidence.',
    )
    assert judgment.advice.quality_speed == ()
    assert not any("as fast" in verdict.sentence for verdict in judgment.verdicts)


def test_no_gain_and_not_enough_evidence(usual):
    rounds = [cell for cell in usual.speed if cell.round < 3]
    advice = judge(replace(usual, speed=rounds)).advice
    assert advice.winner == FULL.name
    assert list(advice.sentences[:3]) == [
        "Deploy full: no other variant is both safe and surely at least 5% faster at 4k, 1 user, cached "
        "prompts.",
        "Not safe: window 1020 + 4 sinks.",
        "top-k 512 is safe, but not surely at least 5% faster: time per token: 3 rounds were measured, and "
        "an interval takes 6.",
    ]
    fewer = [row for row in usual.answers if row.index < 4 and row.turn < 8]
    judgment = judge(replace(usual, answers=fewer))
    assert (
        "top-k 512: not enough evidence of its quality; about 1 more minute of measuring would settle it."
        in (judgment.advice.sentences)
    )
    more = "(-3.6 to 8; margin 5); about 23 more questions would settle it"
    assert more in judgment.verdicts[1].sentence


def test_of_full_attention_it_is_said_too_that_its_memory_grows(usual):
    rounds = [cell for cell in usual.speed if cell.round < 3]
    said = " ".join(judge(replace(usual, speed=rounds)).advice.sentences)
    assert re.search(
        r"Full attention's KV cache grows with the context: \d+ MiB at 1k and \d+ MiB at 4k", said
    )


def test_rounds_that_did_not_count_are_told(usual):
    why = "full and top-k 512 read the same"
    aside = [replace(cell, set_aside=why) if cell.round < 2 else cell for cell in usual.speed]
    told = f"2 rounds of {DECODE.label} did not count: {why}"
    found = replace(usual, speed=aside)
    assert told in " ".join(text(found, 200).split())
    assert told in render(found, judge(found))


def test_no_difference_and_a_cost(usual):
    figures = {FULL.name: 5.0, WINDOW.name: 6.0}
    slower = [
        replace(
            cell,
            figures={
                **cell.figures,
                "tpot": figures.get(cell.deployment, 5.1 - 0.2 * (cell.round % 2)) / 1e3,
            },
        )
        for cell in usual.speed
    ]
    judgment = judge(replace(usual, speed=slower))
    assert (
        "top-k 512 is safe, but not surely at least 5% faster: time per token: no difference could be shown "
        "(0.98 to 1.02 times)."
    ) in judgment.advice.sentences
    assert "It costs: at 4k it takes 1.20 times as long per token." in judgment.verdicts[0].sentence
    assert "as fast" not in judgment.verdicts[0].sentence


def test_a_candidate_that_failed_is_named(usual):
    judgment = judge(replace(usual, failed={TOPK.name: "the engine died"}))
    assert judgment.advice.sentences[-1] == "top-k 512 failed while it was measured: the engine died."
    assert judgment.verdicts[1].sentence == "top-k 512 failed while it was measured: the engine died."
    assert judgment.advice.winner == FULL.name
    nothing = judge(replace(usual, failed={FULL.name: "the engine died"})).advice
    assert nothing.winner == ""
    assert (
        nothing.sentences[0]
        == "There is no recommendation, since there is no full to hold the others against."
    )


def test_a_safe_variant_that_saves_memory(usual):
    small = [replace(row, bytes=row.bytes / 4, fits=4 * row.fits) if row.deployment == TOPK.name else row
             for row in usual.memory]  # fmt: skip
    same = [replace(cell, figures={**cell.figures, "tpot": 0.005}) for cell in usual.speed]
    advice = judge(replace(usual, memory=small, speed=same)).advice
    assert advice.winner == FULL.name
    assert (
        "If memory is what you lack: top-k 512 is safe too, and 1 GiB of KV cache holds 120 sequences of 4k, "
        "3.75 times as many as under full attention."
    ) in advice.sentences
    assert advice.quality_memory == (FULL.name, WINDOW.name, TOPK.name)


def test_the_oracle_tells_budget_and_selector_apart():
    oracle = sparse("oracle 512", "oracle", budget=512)
    sizes = replace(SIZES, candidates=(FULL, TOPK, oracle))
    drawn = plain(draw(1, sizes), {TOPK.name: 2.0, oracle.name: 3.0}, topk=0.08, **{oracle.name: 0.02})
    advice = judge(drawn).advice
    assert advice.winner == FULL.name, "the oracle is not for serving"
    at = advice.sentences.index(
        "The loss of oracle 512 is the budget's price; the rest of top-k 512's comes from how it selects."
    )
    assert advice.sentences[at - 1] == (
        "top-k 512 beside oracle 512, which sees the tokens that truly weigh most, at 4k: perplexity 1.083 "
        "and 1.02 times full's; 0 and 0 of 100 points lost in tasks."
    )
    alike = plain(draw(1, sizes), {TOPK.name: 2.0, oracle.name: 3.0}, topk=0.08, **{oracle.name: 0.08})
    assert "Their intervals overlap: no loss is shown to come from how it selects." in (
        judge(alike).advice.sentences
    )


def test_two_loads(usual):
    users = replace(DECODE, concurrency=8)
    more = [replace(cell, load=users.label) for cell in usual.speed if cell.load == DECODE.label]
    both = replace(
        usual, plan=replace(usual.plan, loads=(*usual.plan.loads, users)), speed=[*usual.speed, *more]
    )
    assert (
        "At 4k, 8 users, cached prompts it generates 1.25 times as many tokens per second (1.24 to 1.26)."
        in judge(both).advice.sentences
    )
    assert "4k, 8 users, cached prompts" in text(both, 80)
    alone = replace(both, plan=replace(both.plan, loads=(users,)))
    for first in (users, replace(users, concurrency=0, rate=2.0)):
        rows = [replace(cell, load=first.label) for cell in more]
        own = replace(alone, plan=replace(alone.plan, loads=(first,)), speed=rows)
        said = text(own, 120)
        assert all(head in said for head in ("TPOT", "tok/s", "output tokens per second of all users"))


def test_settings_keep_all_their_digits(usual):
    changed = Margins(score=0.001, logprob=0.001, agreement=0.001, speed=0.001)
    fine = replace(usual, plan=replace(usual.plan, confidence=0.999, margins=changed))
    assert "intervals at 99.9% confidence" in text(fine, 120)
    said = " ".join(judge(fine).advice.sentences)
    assert "at 99.9% confidence" in said
    assert "100%" not in said
    assert [amount(unit)(0.001) for unit in ("perplexity", "score", "agreement", "logprob")] == [
        *("1.001", "0.1", "0.1%", "0.001")
    ]
    assert [setting(share) for share in (0.95, 0.07, 0.999, 0.001)] == ["95%", "7%", "99.9%", "0.1%"]


def test_minutes_bring_none_of_ones_own_questions():
    loss = Interval(0.0, -0.04, 0.1, 40)
    own = Evidence("x", "own", 0, "score", loss, 0.05, 1, 1, Outcome.UNKNOWN, 34)
    tasks = replace(own, measure="tasks", length=LONG, more=40)
    assert settling([own], 240) == "about 34 more questions of your own would settle it"
    assert settling([tasks], 240) == "about 4 more minutes of measuring would settle it"
    both = "about 4 more minutes of measuring and 34 more questions of your own would settle it"
    assert settling([own, tasks], 240) == both
    unknown = replace(tasks, loss=Interval(0.0, count=40))
    assert settling([unknown], 240) == "it takes at least 4 more minutes of measuring"
    assert more_words(unknown) == "it takes at least 40 more questions"
    assert settling([tasks, replace(own, loss=Interval())], 240).startswith("some of it was not measured")
    text_ = replace(tasks, measure="text", unit="perplexity")
    assert settling([text_], 240).endswith("would settle it, if the text is long enough")


def test_a_length_that_all_see_whole_is_said_to_tell_nothing(usual):
    names = [FULL.name, WINDOW.name]
    alone = replace(usual, plan=replace(usual.plan, candidates=(FULL, WINDOW)))
    alone.answers = [row for row in usual.answers if row.deployment in names]
    (told,) = judge(alone).uninformative
    assert told.startswith("all at 1k: every variant sees the whole context")
    assert judge(usual).uninformative == (), "top-k 512 does not"
