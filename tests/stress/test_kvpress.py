"""Attention variants against kvpress: the same model in float32, the same task file, the same token ids.

These are the same by construction, so the figures must be the same:

- Full attention: every answer.
- StreamingLLM with key rotation, applied token by token: ``sliding_window`` with ``positions=cache``, the log
  probability of every token of a text.
- SnapKV that judges by one query: the tokens whose keys it keeps are those that ``oracle`` chooses for this
  query, in every layer and KV head.
- The same choice, made anew for every token of an answer with kvpress's weights and its masking by head:
  every answer of ``oracle`` with pages of one token, of which the query's own alone is always seen.

kvpress's evaluation measures something else, so only scores can agree, within the interval of their
difference on the same questions:

- kvpress computes a context under full attention, throws keys away once, and keeps all of the rest.
  ``sliding_window`` slides over all of it, the context included. Both are set so that the prompt's last token
  sees keys of the same tokens at the same distances; what these hold of earlier tokens differs, and while
  it answers, kvpress's cache grows where the window slides on.
- SnapKV chooses once, the keys that the question's tokens look at most. ``topk`` keeps all and chooses for
  every new token by bounds of pages; ``oracle`` does by the weights themselves. All see as many keys, in
  every layer (``dense_layers`` empty). Choosing again for every token can only be held to lose nothing
  against choosing once; it finds far more, since SnapKV throws away digits that no question looks at.
"""

import math
from dataclasses import replace
from statistics import mean

import pytest
import torch
from transformers import AutoTokenizer

from attention.patterns.oracle import Oracle
from loadtest import texts
from loadtest.deployment import FULL, Deployment, sparse
from loadtest.greedy import GREEDY
from loadtest.measuring.statistics import score_loss
from loadtest.servers import serve
from loadtest.tasks.registry import make
from loadtest.tasks.score import score
from longspan import Client
from tests.engine.harness import load
from tests.engine.recorded import last_step
from tests.stress import kvpress_peer

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

# Of prompt and answer; that half of the needles lie in the window.
LENGTH, CONTEXTS = 512, 3
SINKS, KEYS = 4, 256
# Of those that see a choice: few enough to lose something.
FEW = 128
# Of a text that is read token by token.
SHORT_KEYS, CHARACTERS = 128, 2000


def window(keys):
    options = {"window": str(keys - SINKS), "sinks": str(SINKS), "positions": "cache"}
    return Deployment(f"window of {keys}, in-cache positions", "sliding_window", options)


def choosing(pattern, keys, **options):
    return sparse(f"{pattern} {keys}", pattern, budget=keys, dense_layers="", **options)


@pytest.fixture(scope="module")
def tokenizer(default_model):
    return AutoTokenizer.from_pretrained(default_model)


@pytest.fixture(scope="module")
def samples(tokenizer):
    prose = texts.prose(texts.reference())

    def count(text):
        return len(tokenizer(text)["input_ids"])

    return [
        each
        for index in range(CONTEXTS)
        for each in make("needles", count, prose, LENGTH, index, seed=0, turns=5)
    ]


@pytest.fixture(scope="module")
def text(samples):
    """A text in a task file's form."""
    words = texts.prose(texts.reference())[:CHARACTERS]
    return replace(samples[0], context=words, question="", answer_prefix="")


@pytest.fixture
def theirs(default_model, samples, tmp_path):
    def of(method, keys):
        return kvpress_peer.run(default_model, method, keys, samples, tmp_path)

    return of


def served(deployment):
    return serve(
        *deployment.arguments, "--weights", "float", "--kv-dtype", "float32", "--kv-memory", "256MiB"
    )


def answers(deployment, samples, theirs):
    """Of our server, to the very token ids that kvpress was asked."""
    with served(deployment) as at, Client(at.host, at.port) as client:
        for sample, row in zip(samples, theirs, strict=True):
            whole = sample.context + sample.question + sample.answer_prefix
            assert row["prompt"] == list(client.tokenize(whole, special_tokens_as_text=True).token_ids)
        return [
            client.generate(row["prompt"], max_tokens=sample.max_new_tokens, **GREEDY).text
            for sample, row in zip(samples, theirs, strict=True)
        ]


def scores(samples, predicted):
    return [score(sample, each) for sample, each in zip(samples, predicted, strict=True)]


def loss_of(samples, ours, theirs):
    """Of score against kvpress, on the same questions."""
    loss = score_loss(theirs, ours, clusters=[sample.index for sample in samples])
    print(f"kvpress {mean(theirs):.2f}, Longspan {mean(ours):.2f}: loss {loss.low:.2f} to {loss.high:.2f}")
    return loss


def test_full_attention_gives_the_same_answers(samples, theirs):
    expected = theirs("full", 0)
    predicted = [row["predicted_answer"] for row in expected]
    assert answers(FULL, samples, expected) == predicted
    assert mean(scores(samples, predicted)) > 0.6


def test_a_sliding_window_gives_every_token_the_same_probability(default_model, text, tmp_path):
    (expected,) = kvpress_peer.run(default_model, "sliding", SHORT_KEYS, [text], tmp_path)
    assert len(expected["prompt"]) > 2 * SHORT_KEYS
    with served(window(SHORT_KEYS)) as at, Client(at.host, at.port) as client:
        found = client.generate(expected["prompt"], max_tokens=1, prompt_logprobs=0, **GREEDY).prompt_logprobs
    differences = [
        abs(ours.chosen.logprob - each) for ours, each in zip(found, expected["logprobs"], strict=True)
    ]
    print(f"largest difference of {len(differences)}: {max(differences):.1e}")
    assert max(differences) < 1e-3


def test_streaming_finds_what_lies_in_the_window_and_nothing_else(samples, theirs, tokenizer):
    expected = theirs("streaming", KEYS)
    by_them = scores(samples, [row["predicted_answer"] for row in expected])
    by_us = scores(samples, answers(window(KEYS), samples, expected))
    outside = []
    for sample in samples:
        after = sample.context.rpartition(sample.answer[0])[2]  # the number is said twice
        outside.append(len(tokenizer(after + sample.question + sample.answer_prefix)["input_ids"]) > KEYS)
    print([*zip(outside, by_them, by_us, strict=True)])
    assert 0.25 < mean(outside) < 0.75
    for found in (by_them, by_us):
        assert not any(one for one, far in zip(found, outside, strict=True) if far)
        assert sum(found) >= 3
    assert not loss_of(samples, by_us, by_them).excludes(0)


def test_a_choice_for_every_token_finds_no_less_than_snapkvs(samples, theirs):
    expected = theirs("snapkv", FEW)
    by_them = scores(samples, [row["predicted_answer"] for row in expected])
    for pattern in ("topk", "oracle"):
        deployment = choosing(pattern, FEW, recent_pages=2)
        assert loss_of(samples, scores(samples, answers(deployment, samples, expected)), by_them).low <= 0


def test_the_same_choice_for_every_token_gives_the_same_answers(samples, theirs):
    expected = theirs("choosing", FEW // 2)
    predicted = [row["predicted_answer"] for row in expected]
    single = choosing("oracle", FEW // 2, sink_pages=0, recent_pages=1)
    found = answers(replace(single, others=("--page-size", "1")), samples, expected)
    same = [one == other for one, other in zip(found, predicted, strict=True)]
    print(f"{sum(same)} of {len(same)} answers are the same")
    # Two keys or two tokens may be all but equal.
    assert mean(same) >= 0.9
    assert not loss_of(samples, scores(samples, found), scores(samples, predicted)).excludes(0)


def test_what_a_query_needs_is_what_the_oracle_chooses(default_model, text, tmp_path):
    (expected,) = kvpress_peer.run(default_model, "kept", FEW, [text], tmp_path)
    asked = last_step(load(default_model), expected["prompt"], rows=len(expected["prompt"]))
    # With pages of one token, the query's own key and the best others: as SnapKV has it.
    pattern = Oracle(FEW, sink_pages=0, recent_pages=1, prefill="sparse")
    same = []
    for index, kept in enumerate(expected["kept"]):
        layer, query, positions, keys, _ = asked[index]
        chosen = pattern.selection(layer, query[-1:], positions[-1:], keys, page_size=1)[0]
        assert chosen.sum(dim=-1).tolist() == [FEW] * layer.kv_heads
        theirs = torch.zeros_like(chosen)
        theirs.scatter_(-1, torch.tensor(kept), True)
        same.append(float((chosen & theirs).sum(dim=-1).min()) / FEW)
    print(f"least share in common: {min(same):.3f}")
    # At the edge, rounding may tell between two that are all but equal.
    assert min(same) >= 1 - 1 / FEW
    assert math.isclose(mean(same), 1, abs_tol=0.002)
