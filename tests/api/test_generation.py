"""What generation answers: events, samples, stops, log probabilities, usage, times."""

import asyncio

import msgspec
import pytest

from longspan.v1 import inference_pb2, types_pb2
from server.messages import Sampling
from tests.api.conftest import END, GENERATION, ask


def kinds(events):
    return [event.WhichOneof("event") for event in events]


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


async def test_a_stream_is_accepted_deltas_finished(running):
    running.engine.step_seconds = 0.002
    events = await running.events(ask(request_id="mine"))
    assert kinds(events)[0] == "accepted"
    assert kinds(events)[-1] == "finished"
    assert set(kinds(events)[1:-1]) == {"delta"}
    accepted, finished = events[0].accepted, events[-1].finished
    assert (accepted.request_id, accepted.model) == ("mine", "fake")
    assert (accepted.prompt_tokens, accepted.cached_prompt_tokens) == (5, 3)
    deltas = [event.delta for event in events[1:-1]]
    assert "".join(delta.text for delta in deltas) == "abcde"
    assert [token for delta in deltas for token in delta.token_ids] == list(b"abcde")
    assert [delta.HasField("result") for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert finished.results[0] == deltas[-1].result
    assert finished.results[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert finished.results[0].token_count == finished.usage.completion_tokens == 5
    times = finished.timings
    assert 0 <= times.queue_seconds <= times.time_to_first_token_seconds <= times.total_seconds
    assert abs(times.queue_seconds + times.prefill_seconds - times.time_to_first_token_seconds) < 1e-6
    assert times.decode_seconds >= 4 * 0.002


async def test_a_unary_answer_is_the_collected_stream(running):
    answer = await running.generate(request_id="mine", n=2)
    events = await running.events(ask(request_id="mine", n=2))
    assert (answer.request_id, answer.model) == ("mine", "fake")
    assert [completion.result for completion in answer.completions] == list(events[-1].finished.results)
    assert answer.usage == events[-1].finished.usage
    for index, completion in enumerate(answer.completions):
        deltas = [event.delta for event in events if event.HasField("delta") and event.delta.index == index]
        assert completion.text == "".join(delta.text for delta in deltas)
        assert list(completion.token_ids) == [token for delta in deltas for token in delta.token_ids]


async def test_prompts_as_text_tokens_and_chat(running):
    await running.generate("héllo")
    await running.generate(None, token_ids={"ids": [1, 299, 0]})
    await running.generate(None, chat=chat(("user", "hi"), ("assistant", "")))
    prompts = [submit.prompt for submit in running.engine.submitted]
    assert prompts == [list("héllo".encode()), [1, 299, 0], list(b"user:hi\nassistant:\n")]


async def test_a_long_text_is_tokenized_whole(running):
    answer = await running.stub.CountTokens(inference_pb2.CountTokensRequest(text="x" * 50_000))
    assert answer.token_count == 50_000


async def test_samples_share_the_prompt_and_differ_by_seed(running):
    answer = await running.generate(n=3, sampling={"seed": 7}, priority=-2)
    first, *others = running.engine.submitted
    assert first.leader is None
    assert {other.leader for other in others} == {first.id}
    assert {submit.priority for submit in running.engine.submitted} == {-2}
    seeds = [submit.sampling.seed for submit in running.engine.submitted]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert max(seeds) < 2**64
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 15
    await running.generate(n=3, sampling={"seed": 7})
    assert [submit.sampling.seed for submit in running.engine.submitted[3:]] == seeds


async def test_unset_seeds_are_drawn_anew(running):
    for _ in range(2):
        await running.generate(sampling={})
    one, two = (submit.sampling.seed for submit in running.engine.submitted)
    assert one != two


async def test_unset_fields_take_the_models_defaults_and_zeros_are_kept(running):
    default = GENERATION.sampling
    await running.generate(sampling={"temperature": 0, "seed": 5}, n=2)
    seeds = [submit.sampling.seed for submit in running.engine.submitted]
    assert [submit.sampling for submit in running.engine.submitted] == [
        Sampling(temperature=0.0, top_k=40, top_p=0.75, repetition_penalty=1.5, seed=seed) for seed in seeds
    ]
    given = {"top_k": 0, "top_p": 1, "repetition_penalty": 1, "logit_bias": {3: 1}, "seed": 5}
    await running.generate(sampling=given)
    assert running.engine.submitted[-1].sampling == Sampling(temperature=0.25, logit_bias={3: 1.0}, seed=5)
    await running.generate(sampling={"seed": 6})
    assert running.engine.submitted[-1].sampling == msgspec.structs.replace(default, seed=6)


async def test_max_tokens_is_bounded_by_the_context(running):
    for stop in ({}, {"max_tokens": 2**32 - 1, "min_tokens": 2**31}):
        answer = await running.generate(stop={"ignore_eos": True, **stop})
        assert answer.usage.completion_tokens == 195
        assert answer.completions[0].result.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert running.engine.submitted[-1].min_tokens == 195


async def test_stop_tokens(running):
    running.engine.tokens = lambda request, position: END if position == 3 else ord("a") + position
    answer = await running.generate(stop={"max_tokens": 9})
    completion = answer.completions[0]
    assert completion.text == "abc"
    assert list(completion.token_ids) == [*b"abc", END]
    assert completion.result.matched_stop.token_id == END
    assert completion.result.finish_reason == types_pb2.FINISH_REASON_STOP
    await running.generate(stop={"max_tokens": 9, "ignore_eos": True, "stop_token_ids": [98]})
    assert running.engine.submitted[-1].stop_token_ids == [98]


async def test_a_stop_string_ends_the_sequence_in_the_engine(running):
    running.engine.step_seconds = 0.002
    for per_step in (1, 4):
        running.engine.per_step = per_step
        answer = await running.generate(stop={"stop_strings": ["xyz", "fg"]}, sampling={"seed": 0})
        completion = answer.completions[0]
        assert completion.text == "abcde"
        assert completion.result.matched_stop.text == "fg"
        assert completion.result.finish_reason == types_pb2.FINISH_REASON_STOP
        assert list(completion.token_ids) == list(b"abcdefg")
        assert completion.result.token_count == answer.usage.completion_tokens == 7
        assert running.engine.aborted == [submit.id for submit in running.engine.submitted]
        assert running.engine.running == 0


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_that_spells_a_special_token_is_that_stop_token(running, include, keep):
    running.engine.tokens = lambda request, position: END if position == 3 else ord("a") + position
    stop = {"stop_strings": ["x", "<end>"], "max_tokens": 9, "ignore_eos": True, "min_tokens": 2}
    fields = {
        "stop": {**stop, "include_stop_string": include},
        "keep_special_tokens": keep,
        "n": 2,
        "sampling": {"seed": 0},
    }
    answer = await running.generate(**fields)
    assert {tuple(submit.stop_token_ids) for submit in running.engine.submitted} == {(END,)}
    assert {submit.min_tokens for submit in running.engine.submitted} == {2}
    assert not running.engine.aborted, "the engine has ended them itself"
    for completion in answer.completions:
        assert completion.text == ("abc<end>" if include else "abc")
        assert completion.result.finish_reason == types_pb2.FINISH_REASON_STOP
        assert completion.result.matched_stop.text == "<end>"
        assert list(completion.token_ids) == [*b"abc", END]
    events = await running.events(ask(**fields))
    for index, completion in enumerate(answer.completions):
        deltas = [event.delta for event in events if event.HasField("delta") and event.delta.index == index]
        assert "".join(delta.text for delta in deltas) == completion.text
        assert deltas[-1].result.matched_stop.text == "<end>"


@pytest.mark.parametrize(
    "prompt",
    [{}, {"text": None, "token_ids": {"ids": [1, 2]}}, {"text": None, "chat": chat(("user", "hi"))}],
    ids=["text", "ids", "chat"],
)
async def test_forced_tokens_begin_every_sample(running, prompt):
    forced = [*b"so ", END, *b"x"]
    request = ask(**prompt, forced_token_ids=forced, n=2, stop={"max_tokens": 7}, logprobs={"output": 1})
    answer = await running.stub.Generate(request)
    assert [submit.forced for submit in running.engine.submitted] == [forced, forced]
    assert answer.usage.completion_tokens == 14
    for completion in answer.completions:
        assert list(completion.token_ids[:5]) == forced
        assert completion.text[:4] == "so x"
        assert len(completion.text) == 6
        assert len(completion.logprobs) == 7
        assert completion.result.finish_reason == types_pb2.FINISH_REASON_LENGTH
    events = await running.events(request)
    for index, completion in enumerate(answer.completions):
        deltas = [event.delta for event in events if event.HasField("delta") and event.delta.index == index]
        assert "".join(delta.text for delta in deltas) == completion.text
        assert [token for delta in deltas for token in delta.token_ids] == list(completion.token_ids)


@pytest.mark.parametrize("per_step", [1, 9])
async def test_stop_strings_end_a_sample_after_its_forced_tokens(running, per_step):
    running.engine.per_step = per_step
    for stops, text in (
        (["o", "so", "<end>"], "so fghi"),  # only within what is forced
        (["o f"], "s"),  # ends after it
        (["fg"], "so "),
        ([" ", "h"], "so fg"),
    ):
        stop = {"stop_strings": stops, "max_tokens": 8}
        answer = await running.generate(forced_token_ids=[*b"so ", END], sampling={"seed": 1}, stop=stop)
        (completion,) = answer.completions
        assert completion.text == text
        ended = completion.result.matched_stop.text
        assert ended == (stops[-1] if text != "so fghi" else "")
    await running.generate(forced_token_ids=[*b"abc"], stop={"stop_strings": ["c"], "min_tokens": 2})
    assert running.engine.submitted[-1].min_tokens == 2


async def test_one_sample_stops_and_the_other_goes_on(running):
    running.engine.step_seconds = 0.002
    running.engine.tokens = lambda request, position: ord("a") + position + (1 if request.leader else 0)
    answer = await running.generate(n=2, stop={"stop_strings": ["ab"], "max_tokens": 10})
    reasons = [completion.result.finish_reason for completion in answer.completions]
    assert reasons == [types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH]
    assert [completion.text for completion in answer.completions] == ["", "bcdefghijk"]


async def test_logprobs_come_one_per_token(running):
    answer = await running.generate(logprobs={"output": 3, "prompt": 2}, n=2)
    for completion in answer.completions:
        assert len(completion.logprobs) == len(completion.token_ids) == 5
        for position, entry in enumerate(completion.logprobs):
            assert entry.chosen.logprob == -0.5 - position
            assert [top.rank for top in entry.top] == [1, 2, 3]
            assert entry.chosen.text == chr(97 + position)
    assert len(answer.prompt_logprobs) == 4
    assert all(len(entry.top) == 2 for entry in answer.prompt_logprobs)
    none = await running.generate()
    assert not none.prompt_logprobs
    assert not none.completions[0].logprobs
    zero = await running.generate(logprobs={"output": 0})
    assert [len(entry.top) for entry in zero.completions[0].logprobs] == [0] * 5


async def test_prompt_logprobs_come_before_the_first_delta(running):
    events = await running.events(ask(logprobs={"prompt": 0}))
    assert kinds(events)[:3] == ["accepted", "prompt_logprobs", "delta"]
    assert kinds(events).count("prompt_logprobs") == 1


async def test_many_prompt_logprobs_come_in_parts(running, monkeypatch):
    monkeypatch.setattr("server.api.answer._MOST_POSITIONS", 50)
    whole = await running.generate(text="x" * 150, logprobs={"prompt": 1})
    events = await running.events(ask(text="x" * 150, logprobs={"prompt": 1}))
    parts = [event.prompt_logprobs.positions for event in events if event.HasField("prompt_logprobs")]
    assert [len(part) for part in parts] == [50, 50, 49]
    assert [entry for part in parts for entry in part] == list(whole.prompt_logprobs)


async def test_many_logprobs_come_in_parts(running, monkeypatch):
    """The tokens of a search come all at once."""
    running.engine.per_step = 5
    monkeypatch.setattr("server.api.answer._MOST_TOKENS", 2)
    events = await running.events(ask(logprobs={"output": 1}))
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert [len(delta.token_ids) for delta in deltas] == [2, 2, 1]
    entries = [entry.chosen.logprob for delta in deltas for entry in delta.logprobs]
    assert entries == [-0.5 - position for position in range(5)]
    assert deltas[-1].result.token_count == 5


async def test_a_character_is_never_split(running):
    text = "aé€😀".encode()
    running.engine.tokens = lambda request, position: text[position]
    running.engine.step_seconds = 0.002
    events = await running.events(ask(stop={"max_tokens": len(text)}))
    texts = [event.delta.text for event in events if event.HasField("delta")]
    assert "".join(texts) == text.decode()
    assert "\ufffd" not in "".join(texts)


async def test_two_hundred_streams_at_once(running):
    running.state.admission.limit = 200
    answers = await asyncio.gather(*(running.generate(sampling={"seed": i}) for i in range(200)))
    for i, answer in enumerate(answers):
        assert answer.completions[0].text == "".join(chr(97 + (i % 10 + k) % 26) for k in range(5))
