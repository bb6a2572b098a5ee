"""Tokenizer files other than ``tokenizer.json``, beside the libraries that they were made for."""

import base64
import json
import sys

import pytest
import tiktoken
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from server.errors import RefusedError
from server.models.tokenizing import convert as tokenizer_convert
from server.models.tokenizing.files import find_tokenizer
from server.text.tokenizer import Tokenizer
from tests.models.gguf.test_sentencepiece import DEFINED, TEXTS, train

SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


def silent(stage, fraction):
    pass


def refuse(stage, fraction):
    raise AssertionError(stage)


@pytest.fixture
def folder(tmp_path):
    """A model's folder but for weights and tokenizer."""
    folder = tmp_path / "Model"
    folder.mkdir()
    write(folder / "config.json", {"model_type": "llama", "eos_token_id": 2})
    return folder


def write(file, content):
    file.write_text(json.dumps(content))


def converted(folder, tmp_path):
    tokenizer_convert.convert(folder, tmp_path / "converted")
    return Tokenizer(tmp_path / "converted")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "unigram"},
        {"model_type": "unigram", "user_defined_symbols": DEFINED},
        {"user_defined_symbols": DEFINED, "add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "plain",
)
def test_a_sentencepiece_model_reads_texts_as_sentencepiece_does(options, folder, tmp_path):
    processor = train(**options)
    (folder / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    tokenizer = converted(folder, tmp_path)
    # Of several ways to cut a word that are equally likely, a unigram model may take any.
    form = sorted if "model_type" in options else list
    for text in TEXTS:
        ids = processor.encode(text)
        assert form(tokenizer.encode(text)) == form([1, *ids]), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == processor.decode(ids)
    assert tokenizer.token_id(tokenizer.eos_token) == 2


def test_tokens_and_settings_of_the_folder_are_added(folder, tmp_path):
    processor = train()
    (folder / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "legacy": False,
        "eos_token": {"content": "<turn>"},
        "added_tokens_decoder": {"600": {"content": "<turn>", "special": True}},
        "chat_template": "{{ messages[0].content }}<turn>",
    }
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    write(folder / "tokenizer_config.json", config)
    tokenizer = converted(folder, tmp_path)
    # Not legacy: nothing is put before what follows a control token.
    assert tokenizer.encode("the<turn>the") == [*processor.encode("the"), 600, *processor.encode("\nthe")[2:]]
    assert tokenizer.token_id(tokenizer.eos_token) == 600
    assert tokenizer.has_chat_template
    assert (tmp_path / "converted" / "additional_chat_templates" / "rag.jinja").read_text() == "rag"
    config["added_tokens_decoder"] = {"700": {"content": "<turn>"}}
    write(folder / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match="'<turn>' should have the id 700, not 600"):
        converted(folder, tmp_path)


@pytest.fixture(scope="module")
def byte_level():
    """A small byte-level vocabulary, as bytes in the order of their ranks."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*TEXTS, "the import of the class " * 50], trainer)
    return json.loads(backend.to_str())["model"]


def ranks(model):
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return {bytes(map(byte_of.get, token)): rank for token, rank in model["vocab"].items()}


def test_a_tekken_file_reads_texts_as_tiktoken_does(byte_level, folder, tmp_path):
    entries = sorted(ranks(byte_level).items(), key=lambda item: item[1])
    special = ["<unk>", "<s>", "</s>", "[INST]"]
    tekken = {
        "config": {"pattern": SPLIT, "default_num_special_tokens": 6, "default_vocab_size": 396},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(t).decode()} for t, rank in entries],
        "special_tokens": [{"rank": rank, "token_str": token} for rank, token in enumerate(special)],
    }
    write(folder / "tekken.json", tekken)
    tokenizer = converted(folder, tmp_path)
    kept = dict(entries[:390])  # of 396, six are special
    oracle = tiktoken.Encoding("x", pat_str=SPLIT, mergeable_ranks=kept, special_tokens={})
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *(6 + token for token in oracle.encode(text))], text
    assert tokenizer.encode("[INST]") == [1, 3]


def test_llama_3s_tiktoken_file_is_read_and_others_are_refused(byte_level, folder, tmp_path):
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks(byte_level).items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    size = len(lines)
    with pytest.raises(ValueError, match="does not name the special tokens"):
        converted(folder, tmp_path)
    added = {str(size): {"content": "<|begin_of_text|>"}, str(size + 1): {"content": "<|eot_id|>"}}
    said = {"added_tokens_decoder": added, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    write(folder / "tokenizer_config.json", said)
    tokenizer = converted(folder, tmp_path)
    pattern = next(iter(TikTokenConverter.__init__.__defaults__[1:]))
    oracle = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks(byte_level), special_tokens={})
    for text in TEXTS:
        assert tokenizer.encode(text) == [size, *oracle.encode(text)], text
    write(folder / "config.json", {"model_type": "kimi_k2"})
    with pytest.raises(ValueError, match="does not say how it cuts text"):
        converted(folder, tmp_path)


def test_vocabulary_and_merges_are_read_by_the_models_own_class(
    byte_level, folder, tmp_path, conversions_here
):
    write(folder / "vocab.json", byte_level["vocab"])
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in byte_level["merges"]))
    with pytest.raises(ValueError, match="no class that reads them"):
        converted(folder, tmp_path)
    write(folder / "config.json", {"model_type": "gpt2"})
    before = sorted(folder.iterdir())
    found = find_tokenizer(folder, tmp_path / "cache", silent)
    oracle = transformers.GPT2Tokenizer.from_pretrained(folder)
    tokenizer = Tokenizer(found)
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text)["input_ids"], text
    assert find_tokenizer(folder, tmp_path / "cache", refuse) == found, "it is converted once"
    assert sorted(folder.iterdir()) == before, "the model's folder is not written"


def test_a_slow_tokenizer_is_refused_with_its_name(byte_level, folder, tmp_path):
    write(folder / "config.json", {"model_type": "ctrl"})
    write(folder / "vocab.json", {"<unk>": 0, "the</w>": 1})
    (folder / "merges.txt").write_text("#version\n")
    with pytest.raises(ValueError, match=r"only a slow tokenizer for them .CTRLTokenizer"):
        converted(folder, tmp_path)


def test_a_result_that_differs_is_refused(folder, tmp_path, monkeypatch):
    processor, other = train(), train(add_dummy_prefix=False)
    (folder / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    (tmp_path / "other").write_bytes(other.serialized_model_proto())
    wrong = tokenizer_convert.parse_model(tmp_path / "other")
    monkeypatch.setattr(tokenizer_convert, "parse_model", lambda file: wrong)
    with pytest.raises(ValueError, match="into other tokens than before"):
        converted(folder, tmp_path)


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch):
    (folder / "tokenizer.model").write_bytes(train().serialized_model_proto())
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install sentencepiece, then start again"):
        converted(folder, tmp_path)


def test_a_folder_without_any_has_none_and_one_without_its_vocabulary_is_refused(folder, tmp_path):
    assert find_tokenizer(folder, tmp_path / "cache", refuse) is None
    write(folder / "tokenizer_config.json", {})
    with pytest.raises(RefusedError, match="but no vocabulary"):
        find_tokenizer(folder, tmp_path / "cache", refuse)
