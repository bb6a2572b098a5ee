"""Beam search by an encoder-decoder and by a decoder, against transformers' ``generate``."""

import threading
import time

import msgspec
import pytest
import torch
import transformers

from longspan import DeadlineError, InvalidRequestError
from server.messages import Beams
from tests.e2e.here import serving
from tests.encoder_decoders.harness import generated, load, make_core, own_model, requests, sources_of
from tests.encoder_decoders.zoo import FAMILIES, save_encoder_decoder
from tests.engine.harness import run
from tests.models_zoo import save_tiny

FULL, NEVER = 1, 2
OURS = {False: 0, True: FULL, "never": NEVER}
PAGES = {"threads": 1, "page_size": 8, "weights": "float"}
SOURCES = sources_of(9, 30, 17, 8)
ASKED = [
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": 0.4, "early_stopping": "never", "no_repeat_ngram_size": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Whose outputs end by themselves now and then."""
    return save_encoder_decoder("t5", tmp_path_factory.mktemp("t5"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def server(folder):
    # So few pages that searches side by side have to give way.
    with serving(model=str(folder), **PAGES, max_running=8, kv_memory="1700K") as running:
        yield running


@pytest.fixture(scope="module")
def own(folder):
    return own_model(folder)


@pytest.fixture(scope="module")
def stops(own):
    """Tokens that often come among the likeliest, so that beams finish early."""
    common = generated(own, SOURCES[0], 12, num_beams=6, eos_token_id=None)
    return sorted({1, common[4], common[9]})


def asked_of(options, stops):
    options = {**options, "early_stopping": OURS[options.get("early_stopping", False)]}
    return {**options, "max_tokens": 20, "stop_token_ids": stops}


@pytest.mark.parametrize("options", ASKED)
def test_beams_are_those_of_transformers(options, server, own, stops):
    with server.client() as client:
        for source in SOURCES[:2]:
            answer = client.generate(source, **asked_of(options, stops))
            expected = generated(own, source, 20, **options, eos_token_id=stops)
            assert list(answer.completions[0].token_ids) == expected
            assert answer.usage.prompt_tokens == len(source)


def test_what_a_request_says_of_its_tokens_counts_for_each_beam(server, own, folder, stops):
    """Penalties, biases and stop strings as in transformers; and each token's log probability."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    strings = [" ", "e"]
    more = {"num_beams": 3, "repetition_penalty": 1.4}
    matched = 0
    with server.client() as client:
        for source in SOURCES:
            answer = client.generate(
                *(source,), n=2, stop=strings, logit_bias={30: -4.0}, logprobs=1, **asked_of(more, stops)
            )
            expected = generated(
                *(own, source, 20),
                **more,
                sequence_bias={(30,): -4.0},
                stop_strings=strings,
                tokenizer=tokenizer,
                eos_token_id=[*stops, tokenizer.eos_token_id],
            )
            best = answer.completions[0]
            assert list(best.token_ids) == expected
            assert [entry.chosen.token_id for entry in best.logprobs] == expected
            matched += best.matched_stop in strings
            assert not set(strings) & set(best.text)
    assert matched


def test_several_searches_at_once(server, own, stops):
    found = {}

    def ask(number):
        with server.client() as client:
            answer = client.generate(SOURCES[number], n=2, **asked_of(ASKED[0], stops))
            found[number] = [list(one.token_ids) for one in answer.completions]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outputs in found.items():
        ids = torch.tensor([SOURCES[number]])
        with torch.no_grad():
            expected = own.generate(
                ids,
                max_new_tokens=20,
                num_beams=3,
                num_return_sequences=2,
                eos_token_id=stops,
                do_sample=False,
            )
        pad = own.generation_config.pad_token_id
        for output, row in zip(outputs, expected[:, 1:].tolist(), strict=True):
            assert output == row[: len(output)]
            assert set(row[len(output) :]) <= {pad}


def test_a_search_that_is_ended_early_leaves_nothing(server):
    long = {"num_beams": 8, "max_tokens": 110, "ignore_eos": True, "n": 2}
    with server.client() as client:
        with pytest.raises(DeadlineError):
            client.generate(SOURCES[1], timeout=0.1, **long)
        server.wait_idle()
        found = []
        asking = threading.Thread(
            target=lambda: found.append(client.generate(SOURCES[1], request_id="ended", **long))
        )
        asking.start()
        end = time.monotonic() + 20
        while not client.abort("ended"):
            assert time.monotonic() < end
        asking.join()
        assert [(one.finish_reason, list(one.token_ids)) for one in found[0].completions] == [
            ("aborted", [])
        ] * 2
        server.wait_idle()


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_searches_beside_others_in_chunks_and_preempted(kind, tmp_path):
    """With so few pages that groups give way; each source is encoded once for all of its beams."""
    folder = save_encoder_decoder(kind, tmp_path)
    found, own = load(folder, 64), own_model(folder)
    start = FAMILIES[kind]["decoder_start_token_id"]
    sources, more = sources_of(20, 33, 47, 12), {"eos_token_id": None, "forced_eos_token_id": None}
    searches = requests(sources[:3], start, 20, beams=Beams(count=3, length_penalty=2.0))
    plain = msgspec.structs.replace(requests(sources[3:], start, 30)[0], id=9)
    core = make_core(found, pages=28, max_batch_tokens=16)
    outcomes = run(core, [plain, *searches])
    assert outcomes[9].tokens == generated(own, sources[3], 30, **more)
    for search in searches:
        expected = generated(own, search.prompt, 20, num_beams=3, length_penalty=2.0, **more)
        assert outcomes[search.id].tokens == expected
    assert any(outcomes[search.id].preemptions for search in searches)


def test_a_decoder_searches_too(tmp_path):
    folder = save_tiny("llama", tmp_path)
    own = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with (
        serving(model=str(folder), **PAGES, max_context=128, kv_memory="8MiB") as server,
        server.client() as client,
    ):
        for prompt in SOURCES[:2]:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                expected = own.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)[
                    0, len(prompt) :
                ]
            answer = client.generate(prompt, num_beams=3, max_tokens=12)
            assert list(answer.completions[0].token_ids) == expected.tolist()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 17}, "beam_search.num_beams: is 17; it may be 1 to 16"),
        ({"num_beams": 9}, "beam_search.num_beams: is 9; beams run at once, and this server runs 8"),
        ({"num_beams": 2, "n": 3}, "n: is 3, more than beam_search.num_beams, 2"),
        ({"num_beams": 2, "temperature": 1.0}, "sampling.temperature: is for sampling"),
        ({"num_beams": 2, "seed": 7}, "sampling.seed: is for sampling"),
        ({"num_beams": 2, "length_penalty": 11.0}, "beam_search.length_penalty: is 11"),
        ({"num_beams": 2, "early_stopping": 9}, "beam_search.early_stopping: is 9"),
    ],
)
def test_what_does_not_go_with_beams_is_refused(options, sentence, server):
    with server.client() as client, pytest.raises(InvalidRequestError, match=sentence):
        client.generate(SOURCES[0], **options)
