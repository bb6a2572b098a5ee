"""The real server with the real default model, spoken to through gRPC."""

import asyncio
import random

import pytest
from transformers import AutoTokenizer

from longspan import FinishReason
from server.ready_lines import EXAMPLE
from tests.e2e.here import serving
from tests.engine.harness import transformers_next

pytestmark = pytest.mark.long

JAPAN = [{"role": "user", "content": EXAMPLE}]


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def test_the_capital_of_japan(client):
    answer = client.generate(JAPAN, max_tokens=40, temperature=0)
    assert "Tokyo" in answer.text
    assert answer.finish_reason is FinishReason.STOP
    assert answer.usage.completion_tokens == len(answer.token_ids)
    assert answer.timings.total_seconds >= answer.timings.time_to_first_token_seconds > 0


def test_unset_sampling_is_that_of_the_models_card(client):
    default = client.model_info().default_sampling
    assert (round(default.temperature, 6), round(default.top_p, 6), default.top_k) == (0.2, 0.9, 0)
    answers = client.generate(JAPAN, max_tokens=40, n=8)
    assert {completion.text for completion in answers.completions} == {"The capital of Japan is Tokyo."}
    given = {"temperature": 0.2, "top_p": 0.9, "seed": 5, "max_tokens": 30}
    unset = {"seed": 5, "max_tokens": 30}
    assert client.generate("Once upon", **unset).token_ids == client.generate("Once upon", **given).token_ids


def test_a_stream_says_the_same_piece_by_piece(client):
    whole = client.generate(JAPAN, max_tokens=40, temperature=0)
    stream = client.stream(JAPAN, max_tokens=40, temperature=0)
    deltas = list(stream)
    assert len(deltas) > 3
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)
    assert stream.prompt_tokens == whole.usage.prompt_tokens == client.count_tokens(JAPAN).token_count
    assert stream.usage.completion_tokens == whole.usage.completion_tokens


@pytest.fixture(scope="module")
def exact():
    """The same model, its weights and activations as they are."""
    with serving(weights="float") as server, server.client() as client:
        yield client


def test_tokens_equal_transformers(exact, client, default_model):
    assert (exact.model_info().kv_dtype, client.model_info().kv_dtype) == ("float32", "float16")
    # A page takes twice the bytes.
    kept, halved = exact.server_info().load, client.server_info().load
    assert kept.kv_bytes / (kept.pages_total + 1) == 2 * halved.kv_bytes / (halved.pages_total + 1)
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    texts = ["def fibonacci(n):\n", "Once upon a time " * 12]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    # As text and as tokens, in turn.
    given = [text if i % 2 else prompt for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True))]
    answers = [exact.generate(form, max_tokens=10, temperature=0, ignore_eos=True) for form in given]
    tokens = [list(answer.token_ids) for answer in answers]
    assert [len(output) for output in tokens] == [10] * len(texts)
    assert transformers_next(default_model, prompts, tokens) == tokens
    for answer, output in zip(answers, tokens, strict=True):
        assert answer.text == tokenizer.decode(output, skip_special_tokens=True)


def test_tokenize_and_back(client, default_model):
    text = "Größe 東京 🙂 fin"
    tokens = client.tokenize(text)
    assert list(tokens.token_ids) == AutoTokenizer.from_pretrained(default_model)(text)["input_ids"]
    assert client.detokenize(tokens.token_ids) == text
    assert client.count_tokens(text).token_count == len(tokens.token_ids)
    assert client.count_tokens(text).context_length == client.model_info().context_length == 8192


def test_n_samples_differ_and_repeat_with_their_seed(client):
    def ask(seed):
        answer = client.generate("My favorite animal is", n=3, max_tokens=12, temperature=1, seed=seed)
        return [list(completion.token_ids) for completion in answer.completions]

    first = ask(5)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert ask(5) == first
    assert ask(6) != first


def test_a_stop_string_ends_the_text_before_it(client):
    free = client.generate(JAPAN, max_tokens=30, temperature=0)
    cut = free.text.index("Tokyo")
    stream = client.stream(JAPAN, max_tokens=30, temperature=0, stop=["Tokyo"])
    shown = ""
    for delta in stream:
        shown += delta.text
        assert free.text.startswith(shown)
    assert shown == free.text[:cut]
    assert stream.finish_reason is FinishReason.STOP
    assert stream.results[0].matched_stop.text == "Tokyo"


def test_logprobs(client):
    answer = client.generate("Two plus two is", max_tokens=4, temperature=0, logprobs=2, prompt_logprobs=1)
    entries = answer.completions[0].logprobs
    assert [entry.chosen.token_id for entry in entries] == list(answer.token_ids)
    assert all(entry.chosen.rank == 1 and len(entry.top) == 2 for entry in entries)
    prompt = client.tokenize("Two plus two is").token_ids
    assert [entry.chosen.token_id for entry in answer.prompt_logprobs] == list(prompt[1:])
    assert all(entry.chosen.logprob <= entry.top[0].logprob <= 0 for entry in answer.prompt_logprobs)


def test_forced_tokens_are_decoded(exact):
    """With the log probabilities of the same text as a prompt; the output continues that text."""
    start, rest = "The capital of Japan is", " Kyoto, a town in the"
    prompt, tokens = (list(exact.tokenize(text).token_ids) for text in (start, start + rest))
    assert tokens[: len(prompt)] == prompt
    forced = tokens[len(prompt) :]
    echo = exact.generate(tokens, max_tokens=2, temperature=0, prompt_logprobs=1, logprobs=1)
    expected = [*echo.prompt_logprobs[-len(forced) :], *echo.completions[0].logprobs]
    options = {"forced_token_ids": forced, "temperature": 0, "max_tokens": len(forced) + 2, "logprobs": 1}
    answer = exact.generate(prompt, **options)
    assert answer.text == rest + echo.text
    assert list(answer.token_ids) == [*forced, *echo.token_ids]
    for entry, echoed in zip(answer.completions[0].logprobs, expected, strict=True):
        assert entry.chosen.token_id == echoed.chosen.token_id
        assert entry.chosen.logprob == pytest.approx(echoed.chosen.logprob, abs=1e-4)
        assert entry.top[0].token_id == echoed.top[0].token_id
    assert min(entry.chosen.logprob for entry in expected) < -3
    deltas = list(exact.stream(start, n=2, **options))
    for index in range(2):
        own = [delta for delta in deltas if delta.index == index]
        assert [token for delta in own for token in delta.token_ids] == list(answer.token_ids)
        assert "".join(delta.text for delta in own) == answer.text


def test_forcing_the_tokens_that_a_seed_samples_changes_nothing(client):
    options = {"n": 2, "seed": 5, "temperature": 1, "max_tokens": 12, "logprobs": 0}
    free = client.generate(JAPAN, **options).completions
    forced = list(free[0].token_ids[:5])
    assert list(free[1].token_ids[:5]) != forced
    first, second = client.generate(JAPAN, forced_token_ids=forced, **options).completions
    assert (first.token_ids, first.text, first.finish_reason) == (
        free[0].token_ids,
        free[0].text,
        free[0].finish_reason,
    )
    found, expected = ([e.chosen.logprob for e in sample.logprobs] for sample in (first, free[0]))
    assert found == pytest.approx(expected, abs=1e-3)
    assert list(second.token_ids[:5]) == forced
    assert second.token_ids != free[1].token_ids


def test_a_repeated_prompt_comes_from_the_prefix_cache(client):
    prompt = "The history of the lighthouse keeper and his seven improbable daughters. " * 6
    first = client.generate(prompt, max_tokens=4, temperature=0)
    second = client.generate(prompt, max_tokens=4, temperature=0)
    assert second.usage.cached_prompt_tokens > first.usage.cached_prompt_tokens
    assert second.usage.cached_prompt_tokens > second.usage.prompt_tokens * 0.8
    assert list(first.token_ids) == list(second.token_ids)


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.stress)])
async def test_concurrent_streams_finish_and_leak_no_page(server, count):
    before = server.metrics()
    rng = random.Random(3)
    requests = [
        ([rng.randrange(1000, 40000) for _ in range(rng.randint(2, 40))], rng.randint(4, 14))
        for _ in range(count)
    ]

    async with server.aclient() as client:

        async def run(prompt, max_tokens):
            stream = client.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
            tokens = [token async for delta in stream for token in delta.token_ids]
            assert stream.finish_reason is FinishReason.LENGTH
            assert len(tokens) == stream.usage.completion_tokens == max_tokens
            return tokens

        together = await asyncio.gather(*(run(*request) for request in requests))
        server.wait_idle()
        # Of prompts of whole pages and one token the prefix cache leaves one row.
        one_left = [i for i, (prompt, _) in enumerate(requests) if len(prompt) in (17, 33)]
        again = [*rng.sample(range(count), 4), *one_left[:2]]
        for i in again:
            assert await run(*requests[i]) == together[i], "company changed what was said"
    server.wait_idle()
    after = server.metrics()
    grown = after["longspan_generation_tokens_total"] - before["longspan_generation_tokens_total"]
    sampled = sum(len(tokens) for tokens in together)
    assert grown >= sampled
    finished = 'longspan_requests_total{finish_reason="length",grpc_code="OK"}'
    assert after[finished] - before.get(finished, 0) == count + len(again)


def test_a_seeded_request_ignores_its_company(server):
    async def main():
        async with server.aclient() as client:
            options = {"max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 123}
            single = await client.generate("The sea was", **options)
            crowd = [client.generate(f"Number {i}", max_tokens=12, seed=i) for i in range(8)]
            answers = await asyncio.gather(client.generate("The sea was", **options), *crowd)
            assert list(answers[0].token_ids) == list(single.token_ids)

    asyncio.run(main())
