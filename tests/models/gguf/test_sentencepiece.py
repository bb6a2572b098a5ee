"""GGUF files with SentencePiece vocabularies, beside SentencePiece itself."""

import functools
import inspect
import io
import json
import pydoc
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers.utils import sentencepiece_model_pb2_new as proto

from server.models.gguf.tokenizer import read_tokenizer

DEFINED = ["<ud>", "\u2581\u2581", "aaa"]
PIECES = [
    *(
        "x",
        "the",
        " the",
        "function",
        "  ",
        " ",
        "\n",
        "\t",
        "<ud>",
        "<u",
        "ud>",
        "é",
        "東",
        "aaa",
        "a",
        "aa",
    ),
    *("<0x0A>", "\u2581", "0", "12", "self", "import os", "🙂", "A B", "class"),
]
TEXTS = ["x", " x", "x ", "  x", "", "   ", "<ud>", " <ud> ", "a<ud>b", "a <ud> b", "<ud><0x0A><ud>"]
TEXTS += ["".join(random.Random(seed).choices(PIECES, k=1 + seed % 9)) for seed in range(400)]


def train(**options):
    """A small SentencePiece model of the byte-fallback kind."""
    return sentencepiece.SentencePieceProcessor(model_proto=_trained(json.dumps(options, sort_keys=True)))


@functools.cache
def _trained(options):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*inspect.getsource(pydoc).splitlines(), *["aaaa é ü 東京"] * 20]),
        model_writer=written,
        **{
            "model_type": "bpe",
            "vocab_size": 600,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
            **json.loads(options),
        },
    )
    return written.getvalue()


def metadata(processor, **more):
    """The metadata of such a model's GGUF file."""
    model = proto.ModelProto.FromString(processor.serialized_model_proto())
    said = {
        "model": "llama",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
        "precompiled_charsmap": list(model.normalizer_spec.precompiled_charsmap),
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in said.items() if value is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": DEFINED},
        {"user_defined_symbols": DEFINED, "add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_texts_become_the_same_tokens_and_come_back_the_same(options, tmp_path):
    processor = train(**options)
    read_tokenizer(tmp_path / "x.gguf", metadata(processor)).save_pretrained(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = processor.encode(text)
        assert backend.encode(text, add_special_tokens=False).ids == ids, text
        assert backend.decode(ids, skip_special_tokens=False) == processor.decode(ids)


def test_a_vocabulary_without_bytes_has_unknown_characters():
    processor = train(byte_fallback=False)
    backend = read_tokenizer("x.gguf", metadata(processor)).backend_tokenizer
    for text in TEXTS:
        assert backend.encode(text, add_special_tokens=False).ids == processor.encode(text), text


def test_a_space_is_put_before_texts_unless_the_file_says_otherwise():
    processor = train()
    said = metadata(processor)
    del said["tokenizer.ggml.add_space_prefix"]  # llama.cpp's default for this kind
    assert read_tokenizer("x.gguf", said)("the").input_ids == [1, *processor.encode("the")]


def test_text_after_a_control_token_begins_with_a_space_and_text_after_a_defined_one_does_not():
    """llama.cpp's rule for control tokens, SentencePiece's for those that its user defined."""
    processor = train(control_symbols=["<turn>"], user_defined_symbols=["<ud>"])
    tokenizer = read_tokenizer("x.gguf", metadata(processor))
    turn = processor.piece_to_id("<turn>")
    ids = tokenizer("a<turn>the<ud>the").input_ids
    assert ids == [1, *processor.encode("a"), turn, *processor.encode("the<ud>the")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a the<ud>the"


def test_spaces_after_phi_3s_control_tokens_are_dropped():
    processor = train(control_symbols=["<turn>"])
    said = {**metadata(processor), "general.architecture": "phi3"}
    turn = processor.piece_to_id("<turn>")
    expected = [1, turn, *processor.encode("the")]
    assert read_tokenizer("x.gguf", said)("<turn>\n the").input_ids == expected


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"scores": None}, "no scores"),
        ({"tokens": None}, "has no vocabulary"),
        ({"token_type": [1]}, "says the kinds of 1"),
        ({"eos_token_id": 600}, "eos_token_id is 600; its vocabulary has the tokens 0 to 599"),
        ({"add_sep_token": True}, "add_sep_token"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token"),
        ({"model": "bert"}, "none of gpt2, llama, gemma4"),
    ],
)
def test_a_file_without_a_needed_key_is_refused_by_its_name(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_tokenizer("x.gguf", metadata(train(), **wrong))


def test_tokens_of_characters_that_are_none_are_refused():
    """SentencePiece joins any characters; the merges of the tokenizers library begin with tokens."""
    said = metadata(train())
    tokens = said["tokenizer.ggml.tokens"]
    tokens[tokens.index("e")] = "\u2603"
    with pytest.raises(ValueError, match="of which 'e' is no token"):
        read_tokenizer("x.gguf", said)
