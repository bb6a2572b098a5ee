"""LED by a server: windows in its encoder, a global first token, sources longer than targets."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from typer.testing import CliRunner

from longspan import InvalidRequestError
from server.cli.application import application
from server.errors import RefusedError
from tests.e2e.here import serving
from tests.encoder_decoders.harness import generated, load, own_model, sources_of
from tests.encoder_decoders.zoo import CONTEXT, save_encoder_decoder

TARGET = 60
# Around the windows of 8 and 4 tokens, and the longest source.
SOURCES = sources_of(1, 7, 8, 9, 33, 61, CONTEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_encoder_decoder("led", tmp_path_factory.mktemp("led"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def own(folder):
    return own_model(folder)


@pytest.fixture(scope="module")
def client(folder):
    # Steps of few tokens, and pages for so few sequences that some are preempted.
    pages = {"page_size": 8, "max_running": 8, "max_batch_tokens": 24, "kv_memory": "700K"}
    with serving(model=str(folder), threads=1, **pages) as server, server.client() as client:
        yield client


def output(answer):
    return list(answer.completions[0].token_ids)


def test_side_by_side_and_in_beams_it_generates_as_in_transformers(client, own):
    with ThreadPoolExecutor(len(SOURCES)) as pool:
        found = list(pool.map(lambda source: output(client.generate(source, max_tokens=12)), SOURCES))
    assert found == [generated(own, source, 12) for source in SOURCES]
    assert len({tuple(tokens) for tokens in found}) > 3, "sources must matter"
    for source in SOURCES[3:6]:
        beams = client.generate(source, max_tokens=8, num_beams=3)
        assert output(beams) == generated(own, source, 8, num_beams=3)
    again = client.generate(SOURCES[-1], max_tokens=12)
    assert again.usage.cached_prompt_tokens == CONTEXT
    assert output(again) == found[-1]


def test_its_first_token_is_global(own):
    """What it is makes a difference, or the tests above show nothing of it."""
    ids = torch.tensor([SOURCES[5]])
    mask = torch.zeros_like(ids)
    mask[:, 0] = 1
    with torch.no_grad():
        encoder = own.get_encoder()
        local = encoder(input_ids=ids).last_hidden_state
        assert not torch.allclose(
            local, encoder(input_ids=ids, global_attention_mask=mask).last_hidden_state, atol=0.1
        )


def test_sources_are_whole_windows_long_and_targets_have_their_own_length(client, folder):
    info = client.model_info().encoder_decoder
    assert (info.source_length, info.target_length) == (CONTEXT, TARGET)
    with pytest.raises(InvalidRequestError, match="has 129 tokens; this model takes 128 at most"):
        client.generate([*SOURCES[-1], 9])
    assert len(output(client.generate(SOURCES[0], max_tokens=99, ignore_eos=True))) == TARGET - 1
    shorter = load(folder, 50).info
    assert (shorter.source_length, shorter.target_length) == (50, 50)
    between = load(folder, 100).info
    assert (between.source_length, between.target_length) == (100, TARGET)
    with pytest.raises(RefusedError, match="--max-context 129 is more than the model's own 128 positions"):
        load(folder, 129)


def test_backends_tells_both_lengths(folder):
    asked = ["backends", "--model", str(folder)]
    found = CliRunner().invoke(application, asked).stdout
    assert f"Sources have up to {CONTEXT} tokens, targets up to {TARGET}." in " ".join(found.split())
    found = json.loads(CliRunner().invoke(application, [*asked, "--json"]).stdout)
    assert (found["source_length"], found["target_length"]) == (CONTEXT, TARGET)
