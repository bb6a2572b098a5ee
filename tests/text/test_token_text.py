"""What a token adds to a text, for the kinds of tokenizers there are, beside the library's own decoding."""

import inspect
import pydoc

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from server.text.token_text import TokenTexts

TEXTS = ["the first lines of this text", "import os, sys", "unthinkably  long  words", "x"]


def train(model, trainer, pre_tokenizer, decoder, without=""):
    tokenizer = Tokenizer(model)
    if without:
        tokenizer.normalizer = normalizers.Replace(Regex(f"[{without}]"), "")
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator([*inspect.getsource(pydoc).splitlines()[:600], *TEXTS * 50], trainer)
    return tokenizer


def options(**more):
    return {"vocab_size": 700, "show_progress": False, "special_tokens": ["<unk>", "<s>"], **more}


def make(kind, without):
    match kind:
        case "byte-level":
            trainer = trainers.BpeTrainer(**options(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
            cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
            return train(models.BPE(), trainer, cut, decoders.ByteLevel(), without)
        case "metaspace":
            trainer = trainers.UnigramTrainer(**options(unk_token="<unk>"))
            return train(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace(), without)
        case "sentencepiece":
            bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
            trainer = trainers.BpeTrainer(**options(special_tokens=["<unk>", "<s>", *bytes_]))
            steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
            model = models.BPE(unk_token="<unk>", byte_fallback=True)
            return train(model, trainer, pre_tokenizers.Metaspace(), decoder, without)
        case "words end with </w>":
            trainer = trainers.BpeTrainer(**options(end_of_word_suffix="</w>"))
            model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
            return train(model, trainer, pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>"), without)
        case "wordpiece":
            trainer = trainers.WordPieceTrainer(**options())
            decoder = decoders.WordPiece(cleanup=False)
            return train(
                models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace(), decoder, without
            )
        case _:
            trainer = trainers.WordLevelTrainer(**options())
            return train(
                models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace(), None, without
            )


KINDS = ["byte-level", "metaspace", "sentencepiece", "words end with </w>", "wordpiece", "words"]


@pytest.mark.parametrize("without", ["", "a", "a-f0-9"], ids=lambda letters: f"without {letters or 'none'}")
@pytest.mark.parametrize("kind", KINDS)
def test_joined_they_are_what_decoding_gives_but_for_the_ends(kind, without):
    tokenizer = make(kind, without)
    text_of = TokenTexts(tokenizer, byte_level=kind == "byte-level").of
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert "".join(map(text_of, ids)).strip() == tokenizer.decode(ids).strip()
    assert text_of(tokenizer.token_to_id("<s>")).strip() == "<s>"
    assert text_of(100_000) == "", "an id of the model that the tokenizer does not know"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("byte-level", ["the", " first", " text"]),
        ("metaspace", [" the", " first", " text"]),
        ("sentencepiece", [" the", " first", " text"]),
        ("words end with </w>", ["the ", "first ", "text "]),
        ("wordpiece", [" the", " first", " text"]),
        ("words", [" the", " first", " text"]),
    ],
)
def test_a_word_has_the_space_that_belongs_to_it(kind, expected):
    tokenizer = make(kind, "")
    text_of = TokenTexts(tokenizer, byte_level=kind == "byte-level").of
    ids = tokenizer.encode("the first text", add_special_tokens=False).ids
    assert [text_of(token) for token in ids] == expected


def test_a_byte_alone_is_no_character():
    tokenizer = make("sentencepiece", "")
    assert TokenTexts(tokenizer, byte_level=False).of(tokenizer.token_to_id("<0xE6>")) == "\ufffd"
