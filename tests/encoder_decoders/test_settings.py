"""What a server of an encoder-decoder tells and refuses at start, and what its folder says of targets."""

import json
import logging

import pytest
from typer.testing import CliRunner

from server.cli.application import application
from server.encoder_messages import EncoderDecoderInfo
from server.engine.prepare_encoder_decoder import prepare_encoder_decoder
from server.errors import RefusedError
from server.models.target import read_target
from server.settings import Settings
from tests.encoder_decoders.zoo import save_encoder_decoder

INFO = EncoderDecoderInfo(128, 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_encoder_decoder("bart", tmp_path_factory.mktemp("bart"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"speculate": "ngram"}, "--speculate: .* none of its tokens are drafted; leave it out"),
        ({"rope_scaling": "yarn"}, "--rope-scaling: .* has no RoPE; leave it out"),
        (
            {"attention": "sliding_window", "attention_option": {"window": "64"}},
            "--attention sliding_window: the decoder of an encoder-decoder sees all .* --attention full",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings, sentence, folder):
    with pytest.raises(RefusedError, match=sentence):
        prepare_encoder_decoder(Settings(**settings), folder, lambda stage, fraction: None)


def test_backends_tells_what_would_be_served(folder):
    result = CliRunner().invoke(application, ["backends", "--model", str(folder), "--json"])
    document = json.loads(result.stdout)
    assert (document["architecture"], document["source_length"]) == ("BartForConditionalGeneration", 128)
    assert document["attention"]["pattern"] == "full"
    assert (document["tasks"], document["speculate"]) == (["generate"], [])


def test_what_the_makers_say_of_targets(caplog):
    file = {
        "decoder_start_token_id": [4],
        "forced_bos_token_id": 7,
        "max_length": 30,
        "min_length": 3,
        "bad_words_ids": [[5], [6]],
        "suppress_tokens": [9],
        "no_repeat_ngram_size": 3,
    }
    target, used = read_target((file, {"forced_eos_token_id": 2}), INFO, 10)
    assert (target.start, target.forced_first, target.forced_end) == ([4], 7, None)
    assert (target.max_tokens, target.min_tokens, target.no_repeat_ngram) == (29, 2, 3)
    assert target.banned == [5, 6, 9]
    assert "bad_words_ids" in used
    assert target.bare().max_tokens is None
    # Words of several tokens are not banned, and the log has to say so.
    _, used = read_target(({**file, "bad_words_ids": [[5], [6, 7]]}, {}), INFO, 10)
    assert "bad_words_ids" not in used
    # Without a file for generation the config says it.
    target, _ = read_target(({}, {"bos_token_id": 1, "forced_eos_token_id": 2}), INFO, 10)
    assert (target.start, target.forced_end, target.max_tokens) == ([1], 2, None)
    with caplog.at_level(logging.WARNING, "longspan"):
        target, _ = read_target(
            ({"forced_bos_token_id": 10, "min_length": -1}, {"bos_token_id": 1}), INFO, 10
        )
    assert (target.forced_first, target.min_tokens) == (None, 0)
    assert "forced_bos_token_id is 10, which is no token of the model" in caplog.text
    assert "min_length is -1" in caplog.text
    with pytest.raises(RefusedError, match="what the decoder begins with is not said"):
        read_target(({}, {}), INFO, 10)


def test_what_begins_a_target_is_the_generation_files_and_never_guessed(caplog):
    """transformers begins with the file's bos_token_id, even where the config knows better."""
    target, _ = read_target(({"bos_token_id": 1}, {"decoder_start_token_id": 4}), INFO, 10)
    assert target.start == [1]
    assert "not with config.json's decoder_start_token_id, 4" in caplog.text
    target, _ = read_target(({"max_length": 9}, {"decoder_start_token_id": 4}), INFO, 10)
    assert target.start == [4]
    for value in (10, -1, "2", [2, 3], True):
        with pytest.raises(RefusedError, match=r"generation_config.json: decoder_start_token_id is"):
            read_target(({"decoder_start_token_id": value, "bos_token_id": 1}, {}), INFO, 10)


def test_bans_end_no_output_and_no_server(caplog):
    start = {"decoder_start_token_id": 0}
    target, used = read_target(({**start, "bad_words_ids": [[2], [5]]}, {}), INFO, 10, [2])
    assert target.banned == [5]
    assert "bad_words_ids" in used
    for words in (7, "ab", {"a": 1}, [5]):
        target, used = read_target(({**start, "bad_words_ids": words}, {}), INFO, 10)
        assert target.banned == []
        assert "bad_words_ids" not in used
    target, _ = read_target(({**start, "suppress_tokens": [3, "x", 10]}, {}), INFO, 10)
    assert target.banned == [3]
    assert "suppress_tokens is [3, 'x', 10]" in caplog.text
    with pytest.raises(RefusedError, match="ban every token"):
        read_target(({**start, "suppress_tokens": list(range(10))}, {}), INFO, 10)


def test_a_least_length_before_which_there_is_no_token_is_refused():
    said = {"decoder_start_token_id": 0, "suppress_tokens": list(range(8))}
    read_target((said, {}), INFO, 10, [8, 9])
    for least in ({"min_length": 2}, {"min_new_tokens": 1}):
        read_target(({**said, **least}, {}), INFO, 10, [9])
        with pytest.raises(RefusedError, match=r"before min_length or min_new_tokens no token may be output"):
            read_target(({**said, **least}, {}), INFO, 10, [8, 9])
