"""An encoder-decoder served, against transformers' ``generate``."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from longspan import InvalidRequestError, PreconditionError
from longspan.v1 import inference_pb2
from tests.e2e.here import serving
from tests.encoder_decoders.harness import generated, own_model
from tests.encoder_decoders.zoo import CONTEXT, ENGLISH, FRENCH, GERMAN, save_encoder_decoder

TEXTS = ["a cat", "the module's own documentation", "import", "a cat and another one, in the same house"]
SAID = {
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "forced_bos_token_id": FRENCH,
    "forced_eos_token_id": 2,
    "max_length": 24,
    "min_length": 6,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.2,
    "bad_words_ids": [[1]],
    "suppress_tokens": [70, 71],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose makers say much about how to generate."""
    folder = save_encoder_decoder("mbart", tmp_path_factory.mktemp("mbart"))
    (folder / "generation_config.json").write_text(json.dumps(SAID))
    return folder


@pytest.fixture(scope="module")
def own(folder):
    return own_model(folder)


@pytest.fixture(scope="module")
def tokens(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def client(folder):
    with (
        serving(model=str(folder), threads=1, page_size=8, max_running=4, kv_memory="8MiB") as server,
        server.client() as client,
    ):
        yield client


def output(answer):
    return list(answer.completions[0].token_ids)


def test_generate_is_that_of_transformers(client, own, tokens):
    for text in TEXTS:
        expected = generated(own, tokens(text), None, max_length=24)
        answer = client.generate(text)
        assert output(answer) == expected
        assert expected[0] == FRENCH
        assert answer.usage.prompt_tokens == len(tokens(text))
    again = client.generate(TEXTS[0])
    assert again.usage.cached_prompt_tokens == again.usage.prompt_tokens
    assert output(client.generate(tokens(TEXTS[1]))) == generated(own, tokens(TEXTS[1]), None, max_length=24)


def test_a_request_changes_what_the_makers_say(client, own, tokens):
    source = tokens(TEXTS[1])
    plain = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
    expected = generated(own, source, 10, **plain)
    assert output(client.generate(TEXTS[1], max_tokens=10, **plain)) == expected
    assert expected[-1] == 2
    unending = client.generate(TEXTS[1], max_tokens=10, ignore_eos=True, min_tokens=10, **plain)
    assert output(unending) == generated(
        own, source, 10, min_new_tokens=10, eos_token_id=None, forced_eos_token_id=None, **plain
    )
    assert len(output(client.generate(TEXTS[1], ignore_eos=True, max_tokens=1000))) == CONTEXT - 1


def test_languages(client, own, tokens):
    source = tokens(TEXTS[1])
    assert source[0] == ENGLISH
    german = client.generate(TEXTS[1], source_language="de", target_language="en_XX")
    source[0] = GERMAN
    assert output(german) == generated(own, source, None, max_length=24, forced_bos_token_id=ENGLISH)
    info = client.model_info().encoder_decoder
    assert list(info.languages) == ["__de__", "en_XX", "fr_XX"]
    assert (info.source_length, info.target_length, list(info.start_token_ids)) == (CONTEXT, CONTEXT, [2])


def test_samples_and_streams(client):
    seeded = {"temperature": 1.0, "seed": 7}
    several = client.generate(TEXTS[1], n=3, **seeded)
    assert len({tuple(one.token_ids) for one in several.completions}) > 1
    stream = client.stream(TEXTS[1], **seeded)
    assert "".join(delta.text for delta in stream) == several.completions[0].text


def test_log_probabilities(client, own, tokens):
    answer = client.generate(TEXTS[1], logprobs=0, repetition_penalty=1.0)
    ids = [2, *output(answer)]
    with torch.no_grad():
        logits = own(
            input_ids=torch.tensor([tokens(TEXTS[1])]), decoder_input_ids=torch.tensor([ids[:-1]])
        ).logits[0]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor([one.chosen.logprob for one in answer.completions[0].logprobs])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"target_language": "nl"},
            r"target_language: is 'nl', for which the model has no token; it has __de__",
        ),
        ({"source_language": "nl"}, r"source_language: is 'nl', for which the model has no token"),
        ({"prompt_logprobs": 1}, r"logprobs.prompt: an encoder-decoder predicts no token of its source"),
        ({"no_repeat_ngram_size": 65}, r"no_repeat_ngram_size: is 65; runs of at most 64 tokens"),
        ({"forced_token_ids": [9] * 127}, r"forced_token_ids: makes 128 forced tokens"),
        ({"max_tokens": 2, "forced_token_ids": [9, 9]}, r"forced_token_ids: makes 3 forced tokens"),
    ],
)
def test_what_cannot_be_is_refused(client, options, sentence):
    with pytest.raises(InvalidRequestError, match=sentence):
        client.generate("a cat", **options)


def test_a_prompt_is_as_long_as_the_model_has_positions(client, own):
    longest = [ENGLISH] * CONTEXT
    assert output(client.generate(longest)) == generated(own, longest, None, max_length=24)
    with pytest.raises(InvalidRequestError, match="the prompt has 129 tokens; this model takes 128 at most"):
        client.generate([*longest, 9])
    with pytest.raises(InvalidRequestError, match="source_language: is for text"):
        client.generate(longest, source_language="de")


def test_a_chat_needs_a_template(client):
    with pytest.raises(PreconditionError, match="chat template"):
        client.generate([{"role": "user", "content": "hi"}])


def test_its_executor_is_told(client):
    info = client.model_info()
    assert info.executor.name == "encoder_decoder"
    assert "sources are encoded in one batch" in info.executor.reason
    assert info.tasks == [inference_pb2.TASK_GENERATE]
