"""Questions about one context, asked of servers of the default model."""

import math
from dataclasses import replace

import pytest

from loadtest.deployment import topk
from loadtest.evaluation.agreement import agreeing, same_tokens
from loadtest.evaluation.ask import Asked, ask, prepare
from loadtest.evaluation.prompts import continuation, prompt, special_before
from loadtest.evaluation.requests import at_once
from loadtest.evaluation.types import Answer
from loadtest.tasks.types import Sample
from loadtest.texts import prose, reference, sentences
from longspan import Client, InvalidRequestError, LongspanError, UnavailableError
from tests.loadtest.within import within

pytestmark = pytest.mark.long

NUMBERS = {"apple": "4917263", "river": "8203517", "tower": "1659408"}


def samples(task="needles", turns=3):
    said = sentences(prose(reference()))[:5]
    for place, (key, value) in enumerate(NUMBERS.items()):
        said.insert(4 * place + 1, f"One special magic number for {key} is: {value}.")
    context = f"Special magic numbers are hidden in the text.\n{' '.join(said)}\n"
    return [
        Sample(
            task=task,
            context=context,
            question=f"What is the special magic number for {key} in the text?\n",
            answer_prefix=f"The special magic number for {key} is:",
            answer=(value,),
            max_new_tokens=12,
            target=f" {value}",
            length=500,
            index=4,
            turn=turn,
            depth=(4 * turn + 1) / 13,
        )
        for turn, (key, value) in enumerate(list(NUMBERS.items())[:turns])
    ]


def answers(client, asked, chat=False):
    prompts = prepare(client, asked, chat=chat)
    return [each.answer for each in ask(client, "top-k", asked, prompts)]


@pytest.fixture(scope="module")
def clients(default_model):
    """A selection that reads a part of the context as it decodes, with a prefix cache and without."""
    settings = {"kv_memory": "128MiB", "max_context": 800, "threads": 1}
    with (
        within(topk(192), **settings) as caching,
        within(topk(192), prefix_cache=False, **settings) as forgetful,
        caching.client() as asks_caching,
        forgetful.client() as asks_forgetful,
    ):
        yield asks_caching, asks_forgetful


@pytest.mark.parametrize("chat", [False, True])
def test_turns_are_answered_as_if_each_were_asked_by_itself(clients, chat):
    caching, forgetful = clients
    questions = samples(turns=2)
    together = answers(caching, questions, chat)
    for sample, row in zip(questions, together, strict=True):
        (single,) = answers(forgetful, [sample], chat)
        assert single.cached_tokens == 0
        assert row.cached_tokens > row.prompt_tokens - 64
        assert row.prompt_tokens == single.prompt_tokens
        assert row.predicted_answer == single.predicted_answer
        assert row.score == single.score == float(row.answer[0] in row.predicted_answer)
        assert row.logprob == pytest.approx(single.logprob, abs=0.02)
        assert (row.task, row.length, row.index, row.turn) == ("needles", 500, 4, sample.turn)
        assert (row.deployment, row.depth, row.error) == ("top-k", sample.depth, "")
    if not chat:
        assert any(row.score for row in together)


def test_the_right_answer_is_as_likely_as_the_model_finds_it(clients):
    """Forced to the answer that the model gives itself, tokens have the same log probabilities."""
    _, client = clients
    (sample,) = samples(turns=1)
    ids = prompt(client, sample, chat=False).ids
    free = client.generate(ids, max_tokens=6, temperature=0, logprobs=0).completions[0]
    target = client.detokenize(free.token_ids)
    (asked,) = answers(client, [replace(sample, target=target)])
    assert asked.target_tokens == 6
    assert asked.logprob == pytest.approx(sum(each.chosen.logprob for each in free.logprobs), abs=0.01)
    (unlikely,) = answers(client, [replace(sample, target=" 5550000")])
    assert unlikely.logprob < asked.logprob - 5


def test_a_question_that_is_refused_does_not_hurt_the_others(clients):
    client, _ = clients
    first, second, third = samples()
    long = replace(second, question="word " * 800)
    rows = answers(client, [first, long, replace(third, target="")])
    assert [bool(row.error) for row in rows] == [False, True, False]
    assert "799 at most" in rows[1].error
    assert math.isnan(rows[1].score)
    assert math.isnan(rows[2].logprob)
    assert rows[2].target_tokens == 0
    assert rows[2].predicted_answer


def test_a_chat_prompt_ends_where_the_assistant_speaks(clients):
    client, _ = clients
    (sample,) = samples(turns=1)
    text = client.detokenize(prompt(client, sample, chat=True).ids, keep_special_tokens=True)
    rendered = f"<|im_start|>user\n{sample.context}{sample.question}"
    assert rendered.rstrip("\n") in text
    assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{sample.answer_prefix}")
    assert client.detokenize(prompt(client, sample, chat=True).target) == sample.target


def test_messages_are_a_conversation_as_they_are(clients):
    client, _ = clients
    messages = (("system", "Answer briefly."), ("user", "Where do rivers run?"))
    sample = replace(samples(turns=1)[0], context="", question="", answer_prefix="To", messages=messages)
    ids = prompt(client, sample, chat=False).ids
    assert list(ids[:-1]) == list(client.tokenize(messages).token_ids)
    assert client.detokenize(ids[-1:]) == "To"


def test_special_tokens_in_a_context_stay_text(clients):
    client, _ = clients
    (sample,) = samples(turns=1)
    spelled = replace(sample, context="<|im_end|>\n" + sample.context)
    ends = client.tokenize("<|im_end|>", special_tokens=False).token_ids
    assert len(ends) == 1
    assert ends[0] not in prompt(client, spelled, chat=False).ids
    assert list(prompt(client, spelled, chat=True).ids).count(ends[0]) == list(
        prompt(client, sample, chat=True).ids
    ).count(ends[0])


def test_no_token_spans_the_prompt_and_the_right_answer(clients):
    client, _ = clients
    assert client.detokenize(continuation(client, "The number is", " 12")) == " 12"
    within = continuation(client, "The num", "ber is 12")
    assert client.detokenize(within) == "ber is 12"
    assert continuation(client, "The number is", "") == ()
    assert special_before(client) == ()


def test_a_server_that_has_ended_is_not_a_wrong_answer():
    def gone():
        raise UnavailableError("gone")

    def refused():
        raise InvalidRequestError("refused")

    given = at_once([lambda: 1, refused, lambda: 3])
    assert given[::2] == [1, 3]
    assert isinstance(given[1], LongspanError)
    with pytest.raises(UnavailableError, match="gone"):
        at_once([lambda: 1, gone, lambda: 3])
    with pytest.raises(UnavailableError), Client(port=1, timeout=2) as client:
        prepare(client, samples())


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [([1, 2, 3], [1, 2, 3], 1.0), ([1, 9, 3], [1, 2, 3], 1 / 3), ([1, 2], [1, 2, 3, 4], 0.5), ([], [], 1.0)],
)
def test_answers_agree_up_to_their_first_difference(ours, theirs, share):
    assert same_tokens(ours, theirs) == same_tokens(theirs, ours) == share


def test_agreement_is_the_score_where_no_answer_is_known():
    def asked(tokens, answer=(), **figures):
        return Asked(Answer("x", "own", 900, 0, 0, None, answer, **figures), tokens)

    full = [asked((1, 2, 3, 4)), asked((5,), ("5",), score=1.0), asked((), error="refused"), asked((6,))]
    own = [asked((1, 2, 9)), asked((7,), ("5",), score=0.0), asked((8,)), asked((), error="refused")]
    scores = [row.score for row in agreeing(own, full)]
    assert scores[:2] == [0.5, 0.0]
    assert all(map(math.isnan, scores[2:]))
