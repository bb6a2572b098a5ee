"""Beams in the engine: their answers alone and beside others, and the pages that they hold and leave."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
import torch
import transformers

from server.engine.beam_search import BeamSearch, Continuation
from server.engine.ipc.process import Engine
from server.messages import Beams, FinishReason, Sampling, StepOutput, StopTexts, Submit
from tests.engine.harness import GREEDY, Outcome, collect, greedy_requests, load, make_core, run
from tests.engine.journal import prompts_of
from tests.engine.test_isolated import break_on
from tests.models_zoo import save_tiny

PAGE = 8
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
EARLY = {False: "heuristic", True: "full", "never": "never"}
PROMPTS = prompts_of(9, 30, 17, 8, 41, 5, 22, 13, 36)
MOST = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def own(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


class OfOutput(transformers.LogitsProcessor):
    """Presence and frequency penalties, which transformers lacks."""

    def __init__(self, prompt, presence, frequency):
        self.prompt, self.presence, self.frequency = len(prompt), presence, frequency

    def __call__(self, input_ids, scores):
        counts = torch.zeros_like(scores)
        output = input_ids[:, self.prompt :]
        counts.scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts


def generate(own, prompt, max_tokens, n=1, stops=None, **options):
    """What transformers' ``generate`` gives, padded with -1."""
    ids = torch.tensor([prompt])
    penalties = [options.pop(name, 0.0) for name in ("presence_penalty", "frequency_penalty")]
    with torch.no_grad():
        return own.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            num_return_sequences=n,
            eos_token_id=stops or None,
            pad_token_id=-1,
            logits_processor=[OfOutput(prompt, *penalties)],
            **options,
        )


def generated(own, prompt, *args, **options):
    """The outputs of transformers' ``generate``, the best first, without padding."""
    found = generate(own, prompt, *args, **options)
    return [[token for token in row if token != -1] for row in found[:, len(prompt) :].tolist()]


def submit(id_, prompt, max_tokens, n=1, stops=(), priority=0, strings=(), **options):
    """The same for the engine; its outputs are those of ``id_``, ``id_`` + 100, and so on."""
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return Submit(
        id=id_,
        prompt=prompt,
        sampling=Sampling(
            temperature=0.0,
            no_repeat_ngram=options.get("no_repeat_ngram_size", 0),
            logit_bias={token: bias for (token,), bias in options.get("sequence_bias", {}).items()},
            **{name: options[name] for name in penalties if name in options},
        ),
        max_tokens=max_tokens,
        min_tokens=options.get("min_new_tokens", 0),
        stop_token_ids=list(stops),
        priority=priority,
        beams=Beams(
            count=options["num_beams"],
            length_penalty=options.get("length_penalty", 1.0),
            early_stopping=EARLY[options.get("early_stopping", False)],
            others=[id_ + 100 * i for i in range(1, n)],
            stop=StopTexts(list(strings), False, 1) if strings else None,
        ),
    )


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


def outputs(outcomes, id_, n):
    assert all(outcomes[id_ + 100 * i].finish is not None for i in range(n))
    return [outcomes[id_ + 100 * i].tokens for i in range(n)]


def test_a_search_is_that_of_transformers(loaded, asked, expected):
    core = make_core(loaded, page_size=PAGE)
    for i, (prompt, options) in enumerate(asked):
        outcomes = run(core, [submit(i, prompt, MOST, **options)])
        assert outputs(outcomes, i, options["n"]) == expected[i]


@pytest.fixture(scope="module")
def others(loaded):
    """Sequences without beams, and what each outputs."""
    greedy = greedy_requests(PROMPTS[:3], MOST, first_id=50)
    drawn = [
        Submit(id=60 + i, prompt=prompt, sampling=Sampling(seed=i, top_p=0.9), max_tokens=MOST)
        for i, prompt in enumerate(PROMPTS[:3])
    ]
    core = make_core(loaded, page_size=PAGE)
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
def test_searches_among_others(loaded, asked, expected, others, settings, preempted):
    core = make_core(loaded, page_size=PAGE, **settings)
    requests = [submit(i, prompt, MOST, **options) for i, (prompt, options) in enumerate(asked)]
    outcomes = run(core, [*(other for other, _ in others), *requests])
    for i, (_, options) in enumerate(asked):
        assert outputs(outcomes, i, options["n"]) == expected[i]
    for other, tokens in others:
        assert outcomes[other.id].tokens == tokens
    assert any(outcomes[request.id].preemptions for request in requests) == preempted


@pytest.mark.parametrize("pages", [None, 24])
def test_log_probabilities_and_scores_are_those_of_transformers(loaded, own, asked, pages):
    """Each token's of the model itself, whatever penalties did; also of beams that began again."""
    prompt, options = PROMPTS[4], {"num_beams": 4, "n": 3, "repetition_penalty": 1.3}
    found = generate(
        *(own, prompt, MOST), output_logits=True, output_scores=True, return_dict_in_generate=True, **options
    )
    core = make_core(loaded, page_size=PAGE, **({} if pages is None else {"pages": pages}))
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
    expected = run(make_core(loaded, page_size=PAGE), [plain])[plain.id].prompt_logprobs
    assert [entry.chosen.logprob for entry in outcomes[1].prompt_logprobs] == pytest.approx(
        [entry.chosen.logprob for entry in expected], abs=1e-4
    )


@pytest.mark.parametrize("settings", [{}, {"pages": 24}, {"ahead": True, "prefix_cache": False}])
def test_stop_strings_end_beams_as_in_transformers(loaded, own, folder, stops, settings):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    strings = [" ", "ge o"]  # of part of a token, and of two
    core = make_core(loaded, page_size=PAGE, tokenizer=folder, **settings)
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


def test_beams_hold_their_prompt_once(loaded):
    core = make_core(loaded, page_size=PAGE, prefix_cache=False)
    (prompt,) = prompts_of(60)
    core.submit(submit(1, prompt, 24, num_beams=4))
    most = steps = 0
    while core.has_work:
        core.step()
        steps += 1
        most = max(most, core.kv.pool.held)
    # 7 full pages in common, and of each beam those of 4 tokens of the prompt and of its own.
    assert most <= 7 + 4 * -(-(4 + 24) // PAGE)
    assert steps == 24
    assert core.kv.pool.held == 0


def test_a_preempted_group_computes_what_its_beams_share_once(loaded, own):
    core = make_core(loaded, page_size=PAGE, pages=60, prefix_cache=False)
    (prompt,) = prompts_of(100)
    computed = []
    launch = core.runner.launch

    def counted(scheduled, before=None):
        computed.append(sum(tokens for _, tokens in scheduled))
        return launch(scheduled, before)

    core.runner.launch = counted
    request = submit(1, prompt, 24, num_beams=4)
    core.submit(request)
    for _ in range(10):
        core.step()
    group = core.scheduler._by_id[1]
    assert len(group.parts) == 4
    # A more urgent sequence needs all pages.
    core.submit(Submit(id=2, prompt=prompts_of(350)[0], sampling=GREEDY, max_tokens=1, priority=1))
    core.step()
    assert group.preemptions == 1
    assert not any(part.pages for part in group.parts)
    computed.clear()
    found = []
    while core.has_work:
        found += core.step().sequences
    rest = sum(computed) - 4 * 14
    assert 100 <= rest <= 100 + 4 * 10
    (end,) = [output for output in found if output.id == 1 and output.finish]
    assert [end.tokens] == generated(own, prompt, 24, num_beams=4)
    assert end.preemptions == 1


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_copied_pages_are_the_same_in_every_format(loaded, kv_dtype):
    """The search that copies pages finds what one finds whose pages end where its beams part."""
    (prompt,) = prompts_of(13)
    found = []
    for page_size in (1, PAGE):
        core = make_core(loaded, page_size=page_size, kv_dtype=kv_dtype, kernel="reference")
        found.append(run(core, [submit(1, prompt, 12, num_beams=4)])[1].tokens)
    assert found[0] == found[1]


def test_packed_layers_read_the_copies(folder):
    core = make_core(load(folder, weights="int8"), page_size=PAGE)
    assert core.runner.executor.name == "native"
    requests = [submit(i, prompt, MOST, num_beams=4) for i, prompt in enumerate(PROMPTS[:3])]
    together = run(core, [*requests, *greedy_requests(PROMPTS[3:], MOST, first_id=50)])
    for request in requests:
        without = make_core(load(folder, weights="int8"), page_size=1)
        assert run(without, [request])[request.id].tokens == together[request.id].tokens


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("sliding_window", {"window": "12", "sinks": "4"}),
        ("sparse", {"pattern": "topk", "budget": "16", "recent_pages": "2"}),
    ],
)
def test_beams_under_a_pattern_are_those_of_a_larger_cache(loaded, backend, options):
    """Evicted pages and page summaries are beams' as they are sequences'."""
    prompts = prompts_of(40, 23)
    requests = [submit(i, prompt, 20, num_beams=4) for i, prompt in enumerate(prompts)]
    settings = {"page_size": 4, "backend": backend, "options": options, "prefix_cache": False}
    alone = [run(make_core(loaded, **settings), [request])[request.id].tokens for request in requests]
    together = run(make_core(loaded, pages=80, **settings), requests)
    assert [together[request.id].tokens for request in requests] == alone


def test_an_aborted_search_leaves_nothing(loaded):
    core = make_core(loaded, page_size=PAGE)
    for steps in range(6):
        core.submit(submit(1, PROMPTS[1], 20, num_beams=4))
        for _ in range(steps):
            core.step()
        core.abort(1)
        assert not core.has_work
        assert core.kv.pool.held == 0
        core.scheduler.check_integrity()


def test_nan_fails_a_search_and_no_other(loaded, own):
    core = make_core(loaded, page_size=PAGE)
    logits = core.runner.executor.logits

    def broken(step):
        found = logits(step)
        if len(found) == 5:  # one greedy sequence and four beams
            found[-1, 7] = torch.nan
        return found

    core.runner.executor.logits = broken
    (other,) = greedy_requests([PROMPTS[1]], 20, first_id=9)
    outcomes = run(core, [submit(1, PROMPTS[0], 20, n=2, num_beams=4), other])
    assert [outcomes[i].finish for i in (1, 101)] == [FinishReason.FAILED] * 2
    assert [outcomes[9].tokens] == generated(own, PROMPTS[1], 20, num_beams=1)


@pytest.mark.parametrize(
    ("settings", "request_", "sentence"),
    [
        ({"max_running": 3}, {"num_beams": 4}, "too many to run at once"),
        ({"pages": 17}, {"num_beams": 8}, "8 beams can come to hold 33 pages of 16"),
        ({}, {"num_beams": 2, "strings": ["x"]}, "need a tokenizer"),
    ],
)
def test_beams_that_can_not_all_be_there_are_refused(loaded, settings, request_, sentence):
    core = make_core(loaded, page_size=PAGE, **settings)
    with pytest.raises(ValueError, match=sentence):
        core.submit(submit(1, PROMPTS[0], 30, **request_))


def search(count, penalty, early, max_tokens=10, stops=(0,)):
    beams = Beams(count=count, length_penalty=penalty, early_stopping=early)
    return BeamSearch(
        Submit(
            id=1, prompt=[5], sampling=GREEDY, max_tokens=max_tokens, stop_token_ids=list(stops), beams=beams
        )
    )


def test_a_search_ends_where_no_beam_can_better_the_worst():
    best, other = Continuation(0, 0, -1.0), Continuation(0, 5, -3.0)
    one = search(1, 1.0, "heuristic")
    assert one.advance([best], [other]) == ()
    assert (one.running, one.finished[0].tokens) == ([], [0])
    one = search(1, 2.0, "never")
    one.advance([best], [other])  # -3 / 100 would be better
    assert [beam.tokens for beam in one.running] == [[5]]


def test_each_output_of_a_refused_search_ends(loaded):
    sent: list[bytes] = []
    engine = Engine(SimpleNamespace(send=sent.append), None)
    engine._handle(make_core(loaded, max_running=3), submit(1, PROMPTS[0], 30, n=2, num_beams=4))
    ends = msgspec.msgpack.decode(sent[0], type=StepOutput).sequences
    assert [(end.id, end.finish) for end in ends] == [(1, FinishReason.FAILED), (101, FinishReason.FAILED)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pages", [None, 24])
def test_a_search_that_raises_ends_alone(loaded, asked, expected, ahead, pages):
    """A step that raises is computed in parts, which never part the beams of a search."""
    seen: set[int] = set()
    searches = [submit(i, prompt, MOST, **options) for i, (prompt, options) in enumerate(asked)]
    run(break_on(make_core(loaded, page_size=PAGE), lambda token: seen.add(token) is not None), searches)
    poison = min(set(range(loaded.vocabulary_size)) - seen)
    limits = {} if pages is None else {"pages": pages}
    core = break_on(make_core(loaded, page_size=PAGE, ahead=ahead, **limits), lambda token: token == poison)
    wrong = [
        submit(50, [5, 6, poison], MOST, n=2, num_beams=3),
        *greedy_requests([[9, poison]], 4, first_id=60),
    ]
    found = run(core, [*searches[:2], *wrong, *searches[2:]])
    for i, (_, options) in enumerate(asked):
        assert outputs(found, i, options["n"]) == expected[i]
    assert {found[id_].finish for id_ in (50, 150, 60)} == {FinishReason.FAILED}
    assert core.kv.pool.held == 0
