"""SentencePiece files of encoder-decoders: their makers' ids, or those of transformers' own class."""

import functools
import inspect
import io
import json
import pydoc

import pytest
import sentencepiece
import transformers

from server.errors import RefusedError
from server.models.tokenizing import convert as tokenizer_convert
from server.models.tokenizing import sentencepiece_file
from server.models.tokenizing.files import find_tokenizer
from server.text.tokenizer import Tokenizer
from tests.models.gguf.test_sentencepiece import train

LINES = inspect.getsource(pydoc).splitlines()
TEXTS = [*LINES[:120], "  Two  spaces, ", "12 345.67", "東京 é ü ² Ж", "", "x"]
UNIGRAM = {"model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc"}
UNIGRAM |= {"remove_extra_whitespaces": True, "vocab_size": 500}
T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
EXTRA, MBART, MBART50, PEGASUS = 100, 25, 52, 103


def folder_of(tmp_path, kind, **files):
    """A model's folder; names of files without their dots."""
    folder = tmp_path / kind
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        if isinstance(content, dict):
            file.write_text(json.dumps(content))
        else:
            file.write_bytes(content.serialized_model_proto())
    return folder


def converted(folder):
    target = folder.with_name(f"{folder.name}_converted")
    tokenizer_convert.convert(folder, target)
    return Tokenizer(target)


def alike(tokenizer, expected):
    """Of several ways to cut a word that are equally likely, a unigram model may take any."""
    for text in TEXTS:
        assert sorted(tokenizer.encode(text)) == sorted(expected(text)), text


@pytest.mark.parametrize("kind", ["t5", "mt5", "longt5"])
def test_t5s_ids_are_sentencepieces_and_then_extra_ones(kind, tmp_path):
    processor = train(**UNIGRAM, **T5)
    tokenizer = converted(folder_of(tmp_path, kind, spiece__model=processor))
    alike(tokenizer, lambda text: [*processor.encode(text), 1])
    size = processor.get_piece_size()
    assert tokenizer.token_id("<extra_id_0>") == size + EXTRA - 1
    assert tokenizer.token_id("<extra_id_99>") == size == tokenizer.vocabulary_size - EXTRA
    assert tokenizer.token_id(tokenizer.eos_token) == 1
    assert tokenizer.encode("the <extra_id_0>")[-2:] == [size + EXTRA - 1, 1]


@pytest.mark.parametrize("options", [UNIGRAM, {**UNIGRAM, "model_type": "bpe"}])
def test_mbarts_are_one_more_with_languages_behind(options, tmp_path):
    processor = train(**options)
    size = processor.get_piece_size()

    def ids(text):
        return [index + 1 if index else 3 for index in processor.encode(text)]

    files = {"sentencepiece__bpe__model": processor}
    first = converted(folder_of(tmp_path, "mbart", **files))
    english = size + 1 + transformers.models.mbart.tokenization_mbart.FAIRSEQ_LANGUAGE_CODES.index("en_XX")
    alike(first, lambda text: [*ids(text), 2, english])
    assert first.token_id("<mask>") == first.vocabulary_size - 1 == size + 1 + MBART
    (tmp_path / "50").mkdir()
    said = {"tokenizer_class": "MBart50Tokenizer", "src_lang": "fr_XX"}
    second = converted(folder_of(tmp_path / "50", "mbart", **files, tokenizer_config__json=said))
    french = size + 1 + transformers.models.mbart50.tokenization_mbart50.FAIRSEQ_LANGUAGE_CODES.index("fr_XX")
    alike(second, lambda text: [french, *ids(text), 2])
    assert second.token_id("<mask>") == size + 1 + MBART50
    assert {"en_XX", "fr_XX"} < second.special_tokens.keys()


def test_pegasus_has_its_masks_before(tmp_path):
    processor = train(**UNIGRAM, **T5)
    tokenizer = converted(folder_of(tmp_path, "pegasus", spiece__model=processor))
    alike(tokenizer, lambda text: [*(index + PEGASUS for index in processor.encode(text)), 1])
    assert [tokenizer.token_id(name) for name in ("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk_2>")] == [
        *range(5)
    ]


def test_m2m100s_are_those_of_its_own_class(tmp_path):
    processor = train(**{**UNIGRAM, "model_type": "bpe"})
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    listed = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces[::-1]])}
    folder = folder_of(tmp_path, "m2m_100", sentencepiece__bpe__model=processor, vocab__json=listed)
    slow = transformers.M2M100Tokenizer.from_pretrained(folder)
    tokenizer = converted(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == slow(text)["input_ids"], text
    assert tokenizer.token_id("__fr__") == slow.get_lang_id("fr")
    assert tokenizer.vocabulary_size == len(listed) + 100 + 8
    # A piece without an id is behind them all, so that a text with it is refused rather than changed.
    (lacking, _) = listed.popitem()
    (folder / "vocab.json").write_text(json.dumps(listed))
    (folder.parent / "m2m_100_converted" / "tokenizer.json").unlink()
    tokenizer = converted(folder)
    assert tokenizer.token_id(lacking) == len(listed) + 100 + 8
    (folder / "tokenizer_config.json").write_text(json.dumps({"src_lang": "xx"}))
    with pytest.raises(ValueError, match="names the language 'xx', which its class lacks"):
        converted(folder)


@pytest.fixture
def marian(tmp_path):
    """Of two SentencePiece models whose pieces are not the same, with languages that a source begins with."""
    source = train(**UNIGRAM)
    target = train_swapped()
    pieces = {one.id_to_piece(index) for one in (source, target) for index in range(3, one.get_piece_size())}
    tokens = ["</s>", "<unk>", *sorted(pieces), ">>fra<<", ">>deu<<", "<pad>"]
    listed = {token: index for index, token in enumerate(tokens)}
    return folder_of(tmp_path, "marian", source__spm=source, target__spm=target, vocab__json=listed)


@functools.cache
def train_swapped():
    """A model of other words than ``train``'s."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*(line.swapcase() for line in LINES), *["Ωmega und ÜBER"] * 30]),
        model_writer=written,
        model_type="unigram",
        vocab_size=500,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def test_marians_are_those_of_its_own_class(marian, tmp_path, conversions_here):
    slow = transformers.MarianTokenizer.from_pretrained(marian)
    found = find_tokenizer(marian, tmp_path / "cache", lambda stage, fraction: None)
    tokenizer = Tokenizer(found)
    alike(tokenizer, lambda text: slow(text)["input_ids"])
    for text in (">>fra<< import the module", ">>deu<<def x"):
        assert tokenizer.encode(text) == slow(text)["input_ids"]
    # Outputs have words of the target, which are no part of a source.
    output = slow(text_target="DEF FOO UND ÜBER")["input_ids"]
    assert tokenizer.decode(output) == slow.decode(output, skip_special_tokens=True) == "DEF FOO UND ÜBER"
    assert "".join(tokenizer.token_text(token) for token in output[:-1]).strip() == "DEF FOO UND ÜBER"
    # A character that the source's model does not know is unknown, also where the target has a token for it.
    assert tokenizer.encode("Ω")[-2:] == [1, 0]
    # Another SentencePiece model is converted anew.

    def refuse(stage, fraction):
        raise AssertionError(stage)

    assert find_tokenizer(marian, tmp_path / "cache", refuse) == found
    (marian / "source.spm").write_bytes((marian / "source.spm").read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError, match="converting the tokenizer"):
        find_tokenizer(marian, tmp_path / "cache", refuse)


def test_two_vocabularies_or_one_with_gaps_are_refused(marian):
    (marian / "tokenizer_config.json").write_text(json.dumps({"separate_vocabs": True}))
    with pytest.raises(ValueError, match="a vocabulary for the source and another one for the target"):
        converted(marian)
    (marian / "tokenizer_config.json").unlink()
    (marian / "vocab.json").write_text(json.dumps({"</s>": 0, "<unk>": 2}))
    with pytest.raises(ValueError, match="does not number its tokens from 0 on"):
        converted(marian)


def test_another_models_numbers_are_refused(tmp_path):
    folder = folder_of(tmp_path, "plbart", sentencepiece__bpe__model=train(**UNIGRAM))
    with pytest.raises(ValueError, match="which plbart may give other ids than its own"):
        converted(folder)


CONFIGS = [
    ("t5", {"extra_ids": "many"}, "tokenizer_config.json: extra_ids is 'many'"),
    ("t5", {"extra_ids": 10**9}, "tokenizer_config.json: extra_ids is 1000000000"),
    ("t5", {"tokenizer_class": 5}, "tokenizer_config.json: tokenizer_class is 5"),
    ("t5", {"pad_token": 5}, "pad_token is 5"),
    ("t5", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder: 'x' is no id"),
    ("pegasus", {"offset": None}, "tokenizer_config.json: offset is None"),
]


@pytest.mark.parametrize(("kind", "said", "words"), CONFIGS)
def test_a_config_that_cant_be_meant_is_refused_by_its_key(kind, said, words, tmp_path):
    folder = folder_of(tmp_path, kind, spiece__model=train(**UNIGRAM, **T5), tokenizer_config__json=said)
    with pytest.raises(ValueError, match=words):
        converted(folder)


def _without_unknown(model):
    for piece in model.pieces:
        piece.type = 1 if piece.type == 2 else piece.type


def _odd_score(model):
    model.pieces[9].score = float("nan")


def _equal_pieces(model):
    model.pieces[9].piece = model.pieces[8].piece


BROKEN = [
    (_without_unknown, "has no token for what it does not know"),
    (_odd_score, "a score that is NaN or infinite"),
    (_equal_pieces, "SentencePiece itself can't read spiece.model"),
    (lambda model: model.ClearField("normalizer_spec"), "ends before it says how it treats texts"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_a_damaged_model_is_refused_by_its_name(change, words, tmp_path):
    processor = train(**UNIGRAM, **T5)
    folder = folder_of(tmp_path, "t5", spiece__model=processor)
    file = folder / "spiece.model"
    model = sentencepiece_file.parse_model(file)
    change(model)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=words):
        converted(folder)
    whole = processor.serialized_model_proto()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"spiece.model is no SentencePiece model, or not all of it"):
            converted(folder)


def test_a_model_of_millions_of_tokens_is_not_read(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "t5", spiece__model=train(**UNIGRAM, **T5))
    monkeypatch.setattr(sentencepiece_file, "_MOST_PIECES", 499)
    with pytest.raises(ValueError, match=r"spiece.model has 500 tokens; more than 499 are not read"):
        converted(folder)
    monkeypatch.setattr(sentencepiece_file, "_MOST_BYTES", 1 << 10)
    with pytest.raises(ValueError, match=r"spiece.model has 0 MiB; more than"):
        converted(folder)


VOCABULARIES = [
    ("[]", "holds no JSON object"),
    ('{"a": 0, "b": "1"}', "does not number its tokens from 0 on"),
    ('{"a": 0, "b": 1}', "lacks the token '<unk>'"),
    (None, "vocab.json, which numbers the tokens, is missing"),
]


@pytest.mark.parametrize(("written", "words"), VOCABULARIES)
def test_a_vocabulary_that_numbers_nothing_is_refused(written, words, tmp_path):
    folder = folder_of(tmp_path, "marian", source__spm=train(**UNIGRAM))
    if written is not None:
        (folder / "vocab.json").write_text(written)
    with pytest.raises((ValueError, RefusedError), match=words):
        converted(folder)
