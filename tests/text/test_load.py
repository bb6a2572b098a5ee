"""Whether a tokenizer can be used is tried at the start."""

import json

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from server.panics import TokenizersError
from server.text.decoding import Decoding
from server.text.load import check_tokens, load_tokenizer, try_mask
from tests.encoders.zoo import VOCABULARY, save_encoder

SPECIAL = [f"<SPECIAL_{index}>" for index in range(300)]


@pytest.fixture
def tokenizer(tmp_path):
    """One whose first 300 tokens are special; Mistral's Tekken begins with 1000."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: id for id, token in enumerate([*SPECIAL, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    return load_tokenizer(tmp_path, "the model", None)


def test_the_first_tokens_may_all_be_special(tokenizer):
    assert tokenizer.special_token_ids == set(range(300))
    assert min(tokenizer.encode("hello")) >= 300
    check_tokens(tokenizer, tokenizer.vocabulary_size)


def test_a_model_of_special_tokens_only_has_nothing_to_try(tokenizer, caplog):
    check_tokens(tokenizer, 300)
    assert "the tokenizer has 256 tokens that the model lacks, from 300 on" in caplog.text


@pytest.mark.parametrize(
    ("said", "vocabulary", "kept"),
    [({}, VOCABULARY, True), ({}, 4, False), ({"split_special_tokens": True}, VOCABULARY, False)],
)
def test_a_mask_is_one_that_texts_can_spell(said, vocabulary, kept, tmp_path, caplog):
    config = save_encoder("bert", tmp_path, "MaskedLM") / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
    tokenizer = load_tokenizer(tmp_path, "the model", None)
    assert tokenizer.mask_token == "[MASK]"
    assert tokenizer.special_tokens["[MASK]"] == 4
    try_mask(tokenizer, vocabulary)
    assert tokenizer.mask_token == ("[MASK]" if kept else None)
    assert ("texts can't spell the tokenizer's mask, '[MASK]'" in caplog.text) is not kept


def test_a_mask_that_the_library_fails_on_is_none(tmp_path, caplog, monkeypatch):
    def fail(text):
        raise TokenizersError("a bug")

    tokenizer = load_tokenizer(save_encoder("bert", tmp_path, "MaskedLM"), "the model", None)
    monkeypatch.setattr(tokenizer, "encode", fail)
    try_mask(tokenizer, VOCABULARY)
    assert tokenizer.mask_token is None
    assert "texts can't spell the tokenizer's mask" in caplog.text


def test_tokens_that_only_the_files_beside_name_are_read_alike(tokenizer):
    """The engine process finds stop strings in the text that the client is shown."""
    assert Decoding.read(tokenizer.folder).special_tokens == tokenizer.special_tokens
    config = tokenizer.folder / "tokenizer_config.json"
    more = {"eos_token": "a", "extra_special_tokens": ["<turn>"], "split_special_tokens": False}
    config.write_text(json.dumps({**json.loads(config.read_text()), **more}))
    served, read = load_tokenizer(tokenizer.folder, "the model", None), Decoding.read(tokenizer.folder)
    assert read.special_tokens == served.special_tokens
    assert len(read.special_tokens) == len(SPECIAL) + 2
    ids = [*range(served.vocabulary_size)]
    assert read.decode_known(ids) == served.decode(ids) != Decoding.decode_known(tokenizer, ids)
