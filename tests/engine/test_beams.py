"""Beams in the engine: their answers alone and beside others are those of transformers."""

from __future__ import annotations

import msgspec
import pytest
import transformers

from server.messages import FinishReason, Sampling, Submit
from tests.engine.beams import MOST, PAGE, PROMPTS, generate, generated, outputs, submit
from tests.engine.harness import Outcome, collect, greedy_requests, make_core, run
from tests.engine.test_isolated import break_on

OPTIONS = [
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": 0.4, "early_stopping": "never", "no_repeat_ngram_size": 2},
    {"num_beams": 4, "n": 3},
    {"num_beams": 1},
    {"num_beams": 3, "presence_penalty": 1.2, "frequency_penalty": 0.6},
    {"num_beams": 3, "min_new_tokens": 6, "length_penalty": 0.5},
    {"num_beams": 4, "repetition_penalty": 1.7, "sequence_bias": {(7,): 3.0, (20,): -2.0}},
]


@pytest.fixture(scope="module")
def stops(own):
    """Tokens that often come among the likeliest, so that beams finish early."""
    (common,) = generated(own, PROMPTS[0], 12, num_beams=6)
    return sorted({common[4], common[9]})


@pytest.fixture(scope="module")
def asked(stops):
    """Searches of every kind."""
    return [
        (prompt, {"n": min(2, options["num_beams"]), "stops": stops if i % 3 else [], **options})
        for i, (prompt, options) in enumerate(zip(PROMPTS, OPTIONS, strict=True))
    ]


@pytest.fixture(scope="module")
def expected(own, asked):
    return [generated(own, prompt, MOST, **options) for prompt, options in asked]


def test_a_search_is_that_of_transformers(llama, asked, expected):
    core = make_core(llama, page_size=PAGE)
    for i, (prompt, options) in enumerate(asked):
        outcomes = run(core, [submit(i, prompt, MOST, **options)])
        assert outputs(outcomes, i, options["n"]) == expected[i]


@pytest.fixture(scope="module")
def others(llama):
    """Sequences without beams, and what each outputs."""
    greedy = greedy_requests(PROMPTS[:3], MOST, first_id=50)
    drawn = [
        Submit(id=60 + i, prompt=prompt, sampling=Sampling(seed=i, top_p=0.9), max_tokens=MOST)
        for i, prompt in enumerate(PROMPTS[:3])
    ]
    core = make_core(llama, page_size=PAGE)
    return [(other, run(core, [other])[other.id].tokens) for other in (*greedy, *drawn)]


@pytest.mark.parametrize(
    ("settings", "preempted"),
    [
        ({}, False),
        ({"prefix_cache": False, "max_batch_tokens": 17, "max_running": 17}, False),
        ({"pages": 24}, True),
        ({"pages": 24, "prefix_cache": False, "ahead": True}, True),
    ],
    ids=["together", "in chunks", "preempted", "launched ahead"],
)
def test_searches_among_others(llama, asked, expected, others, settings, preempted):
    core = make_core(llama, page_size=PAGE, **settings)
    requests = [submit(i, prompt, MOST, **options) for i, (prompt, options) in enumerate(asked)]
    outcomes = run(core, [*(other for other, _ in others), *requests])
    for i, (_, options) in enumerate(asked):
        assert outputs(outcomes, i, options["n"]) == expected[i]
    for other, tokens in others:
        assert outcomes[other.id].tokens == tokens
    assert any(outcomes[request.id].preemptions for request in requests) == preempted


@pytest.mark.parametrize("pages", [None, 24])
def test_log_probabilities_and_scores_are_those_of_transformers(llama, own, asked, pages):
    """Each token's of the model itself, whatever penalties did; also of beams that began again."""
    prompt, options = PROMPTS[4], {"num_beams": 4, "n": 3, "repetition_penalty": 1.3}
    found = generate(
        *(own, prompt, MOST), output_logits=True, output_scores=True, return_dict_in_generate=True, **options
    )
    core = make_core(llama, page_size=PAGE, **({} if pages is None else {"pages": pages}))
    one = msgspec.structs.replace(submit(1, prompt, MOST, **options), logprobs=2, prompt_logprobs=1)
    others = [submit(i, other, MOST, **more) for i, (other, more) in enumerate(asked[:2], 2)] if pages else []
    outcomes = {id_: Outcome() for request in (one, *others) for id_ in request.ids}
    for request in (*others, one):
        core.submit(request)
    search = core.scheduler._by_id[1].search
    while core.has_work:
        collect(core, outcomes)
    assert bool(outcomes[1].preemptions) == bool(pages)
    assert [beam.score for beam in search.finished[:3]] == pytest.approx(found.sequences_scores.tolist())
    for row in range(3):
        outcome = outcomes[1 + 100 * row]
        assert len(outcome.logprobs) == len(outcome.tokens) == MOST
        for at, (token, told) in enumerate(zip(outcome.tokens, outcome.logprobs, strict=True)):
            model = found.logits[at][found.beam_indices[row, at]].log_softmax(-1)
            assert told.chosen.token == token
            assert told.chosen.logprob == pytest.approx(model[token].item(), abs=1e-4)
            assert told.chosen.rank == (model > model[token]).sum() + 1
            assert [entry.token for entry in told.top] == model.topk(2).indices.tolist()
    plain = msgspec.structs.replace(greedy_requests([prompt], 1)[0], prompt_logprobs=1)
    expected = run(make_core(llama, page_size=PAGE), [plain])[plain.id].prompt_logprobs
    assert [entry.chosen.logprob for entry in outcomes[1].prompt_logprobs] == pytest.approx(
        [entry.chosen.logprob for entry in expected], abs=1e-4
    )


@pytest.mark.parametrize("settings", [{}, {"pages": 24}, {"ahead": True, "prefix_cache": False}])
def test_stop_strings_end_beams_as_in_transformers(llama, own, llama_folder, stops, settings):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    strings = [" ", "ge o"]  # of part of a token, and of two
    core = make_core(llama, page_size=PAGE, tokenizer=llama_folder, **settings)
    plain = greedy_requests([PROMPTS[0]], MOST, first_id=50)
    requests, expected = [], {}
    for id_, (prompt, options) in enumerate(zip(PROMPTS[:5], OPTIONS[:5], strict=True), 1):
        options = {"n": 2, "stops": stops if id_ % 2 else [], **options}
        requests.append(submit(id_, prompt, MOST, strings=strings, **options))
        found = generated(own, prompt, MOST, stop_strings=strings, tokenizer=tokenizer, **options)
        expected |= {id_ + 100 * i: tokens for i, tokens in enumerate(found)}
    outcomes = run(core, [*plain, *requests])
    assert {id_: outcomes[id_].tokens for id_ in expected} == expected
    assert [outcomes[50].tokens] == generated(own, PROMPTS[0], MOST, num_beams=1)
    ended = [t for t in expected.values() if any(string in tokenizer.decode(t) for string in strings)]
    assert len(ended) > 4


@pytest.fixture(scope="module")
def poison(llama, asked):
    """A token that no search computes."""
    seen: set[int] = set()
    searches = [submit(i, prompt, MOST, **options) for i, (prompt, options) in enumerate(asked)]
    run(break_on(make_core(llama, page_size=PAGE), lambda token: seen.add(token) is not None), searches)
    return min(set(range(llama.vocabulary_size)) - seen)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pages", [None, 24])
def test_a_search_that_raises_ends_alone(llama, asked, expected, poison, ahead, pages):
    """A step that raises is computed in parts, which never part the beams of a search."""
    searches = [submit(i, prompt, MOST, **options) for i, (prompt, options) in enumerate(asked)]
    limits = {} if pages is None else {"pages": pages}
    core = break_on(make_core(llama, page_size=PAGE, ahead=ahead, **limits), lambda token: token == poison)
    wrong = [
        submit(50, [5, 6, poison], MOST, n=2, num_beams=3),
        *greedy_requests([[9, poison]], 4, first_id=60),
    ]
    found = run(core, [*searches[:2], *wrong, *searches[2:]])
    for i, (_, options) in enumerate(asked):
        assert outputs(found, i, options["n"]) == expected[i]
    assert {found[id_].finish for id_ in (50, 150, 60)} == {FinishReason.FAILED}
    assert core.kv.pool.held == 0
