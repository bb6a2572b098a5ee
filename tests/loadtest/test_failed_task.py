"""A task that full attention itself fails, the whole way: samples, answers, judgment, words."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from loadtest import texts
from loadtest.compare.judge import judge
from loadtest.compare.types import Outcome
from loadtest.evaluation.ask import ask, prepare
from loadtest.tasks.registry import make
from longspan import Generation
from longspan.v1 import inference_pb2
from tests.loadtest.synthetic import FULL, MANY, TOPK, draw
from tests.loadtest.usual import text

TASK, LENGTH, CONTEXTS = "niah_multikey_3", 1024, 8
PROSE = texts.prose(texts.reference())


class Server:
    """Answers as a model that can't do the task, and finds each token of the right answer so likely."""

    def __init__(self, logprob):
        self._logprob = logprob

    def tokenize(self, words, **_):
        return SimpleNamespace(token_ids=list(words.encode()))

    def generate(self, ids, *, max_tokens, forced_token_ids=(), **_):
        answer = inference_pb2.GenerateResponse()
        sample = answer.completions.add(text="I do not know", token_ids=[1, 2, 3])
        if forced_token_ids:
            assert len(forced_token_ids) == max_tokens
            sample.text = bytes(forced_token_ids).decode()
            for number, token in enumerate(forced_token_ids):
                # Not equally likely, so that what is compared is their sum by the number of tokens.
                chosen = {"token_id": token, "logprob": self._logprob - number % 2}
                sample.logprobs.add(chosen=chosen)
        answer.usage.prompt_tokens = len(ids)
        return Generation.from_message(answer)


def answered(index, lost):
    """Rows of both on one context: top-k finds each token of the right answer less likely, by these nats."""
    made = make(TASK, lambda words: len(words) // 4, PROSE, LENGTH, index, seed=0)
    rows = []
    for name, logprob in ((FULL.name, -2.0), (TOPK.name, -2.0 - lost)):
        server = Server(logprob)
        rows += [each.answer for each in ask(server, name, made, prepare(server, made))]
    return rows


def compared(losses):
    drawn = draw(1, replace(MANY, tasks=(TASK,), lengths=(LENGTH,)))
    return replace(drawn, answers=[row for index, lost in enumerate(losses) for row in answered(index, lost)])


@pytest.mark.parametrize(
    ("lost", "outcome", "said"),
    [
        (1.5, Outcome.UNSAFE, "right answers lose 1.50 nats per token in tasks that full attention fails"),
        (
            0.02,
            Outcome.SAFE,
            "right answers lose at most 0.023 nats per token where full fails (margin 0.10)",
        ),
    ],
)
def test_a_task_that_full_fails_is_marked_and_its_right_answers_are_compared(lost, outcome, said):
    losses = [lost + 0.003 * (-1) ** index for index in range(CONTEXTS)]
    comparison = compared(losses)
    assert {row.score for row in comparison.answers} == {0.0}
    assert all(row.target_tokens == len(row.answer[0]) + 1 for row in comparison.answers), "and its space"
    judgment = judge(comparison)
    (verdict,) = judgment.verdicts
    (test,) = [one for one in verdict.evidence if one.measure.startswith("task")]
    assert (test.measure, test.unit, test.decides, test.outcome) == ("tasks", "logprob", True, outcome)
    assert test.loss.value == pytest.approx(lost)
    assert (test.full, test.loss.count) == (pytest.approx(-2.5, abs=0.1), CONTEXTS)
    assert test.note == f"full attention itself fails {TASK}"
    (remark,) = judgment.uninformative
    assert remark.startswith(f"{TASK} at 1k: full attention itself scores 0.00 (0.00 to")
    assert verdict.outcome is outcome
    assert said in verdict.sentence
    shown = " ".join(text(comparison, 100).split())
    assert "These tell nothing of the variants: - niah_multikey_3 at 1k" in shown
    assert said in shown
