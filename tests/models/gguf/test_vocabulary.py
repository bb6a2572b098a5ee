"""Byte-level GGUF vocabularies beside transformers' own classes, and what a file says about generation."""

import inspect
import json
import pydoc

import gguf
import pytest
import transformers
from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from server.models.gguf.file import GgufFile
from server.models.gguf.generation import generation_config
from server.models.gguf.tokenizer import read_tokenizer

TEXTS = [
    "In 2024 it's 3.14159 I'M\n\n  X!",
    "  def f(x):\r\n\treturn x**2  # naïve ",
    "cafe\u0301 \u1100\u1161 ½ ²³ 東京タワー ひらがな 한국어 ไทย",
    "HTTPServer's getURLs() 🙂🙂\u3000x\u00a0y",
    "हिन्दी भाषा, ١٢٣٤ Ⅷ … «quoted» “marks”",
]


@pytest.fixture(scope="module")
def trained():
    """Vocabulary and merges over all bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*inspect.getsource(pydoc).splitlines(), *TEXTS * 5], trainer)
    return tokenizer


def said(tokens, merges=(), kinds=None, **more):
    """The metadata of a GGUF file with these tokens."""
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": list(merges), **more}
    if kinds is not None:
        values["token_type"] = kinds
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize(
    ("pre", "theirs"),
    [
        ("gpt-2", transformers.GPT2Tokenizer),
        ("olmo", transformers.GPTNeoXTokenizer),
        ("command-r", transformers.CohereTokenizer),
        ("qwen2", transformers.Qwen2Tokenizer),
        ("qwen35", transformers.Qwen3_5Tokenizer),
    ],
)
def test_texts_become_the_tokens_of_transformers_own_class(pre, theirs, trained):
    vocabulary = trained.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    ours = read_tokenizer("x.gguf", said(tokens, [" ".join(merge) for merge in merges], pre=pre))
    oracle = theirs(vocab=vocabulary, merges=merges)
    for text in TEXTS:
        expected = oracle(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == expected, text


def test_tokens_that_only_fill_up_are_no_text():
    metadata = said(["a", "b", "[PAD2]", "<|x|>"], kinds=[1, 1, TokenType.UNUSED, TokenType.CONTROL])
    tokenizer = read_tokenizer("x.gguf", metadata)
    assert tokenizer.decode([0, 2, 3, 1]) == "a<|x|>b"
    assert tokenizer.decode([0, 2, 3, 1], skip_special_tokens=True) == "ab"


def test_a_token_that_ends_turns_is_special_under_any_name():
    metadata = said(["a", "<|im_end|>"], kinds=[TokenType.NORMAL, TokenType.NORMAL])
    assert read_tokenizer("x.gguf", metadata)("a<|im_end|>").input_ids == [0, 1]
    assert generation_config(metadata) == {"eos_token_id": 1}


def test_a_file_that_says_it_has_no_tokenizer_has_none():
    metadata = {"tokenizer.ggml.model": "no_vocab", "general.sampling.top_k": 20}
    assert read_tokenizer("x.gguf", metadata) is None
    assert generation_config(metadata) == {"do_sample": True, "top_k": 20}
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model None"):
        read_tokenizer("x.gguf", {})


def test_templates_keep_their_names():
    metadata = {
        **said(["a"]),
        "tokenizer.chat_template": "one",
        "tokenizer.chat_template.rag": "two",
        "tokenizer.chat_templates": ["rag"],
    }
    assert read_tokenizer("x.gguf", metadata).chat_template == {"default": "one", "rag": "two"}
    del metadata["tokenizer.chat_template.rag"]
    with pytest.raises(ValueError, match="lists a chat template 'rag' that it does not have"):
        read_tokenizer("x.gguf", metadata)
    metadata["tokenizer.chat_templates"] = [7]
    with pytest.raises(ValueError, match="lists a chat template 7 that it does not have"):
        read_tokenizer("x.gguf", metadata)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"eos_token_id": 1}, 1),
        ({"eos_token_id": 1, "eot_token_id": 2, "eom_token_id": 3}, [1, 2, 3]),
        ({"eos_token_id": 1, "eot_token_id": 1}, 1),
        ({"eos_token_id": 0xFFFF_FFFF, "eot_token_id": 2}, 2),
        ({"eos_token_id": 1, "eos_token_ids": [1, 3]}, [1, 3]),
    ],
)
def test_the_ends_of_turns_and_messages_are_ends(more, expected):
    metadata = said(["a", "<s>", "<e>", "<m>"], kinds=[1, 3, 3, 3], **more)
    assert generation_config(metadata)["eos_token_id"] == expected


def test_control_tokens_known_by_their_text_are_ends_and_words_are_not():
    """llama.cpp's convention; its rule for tool calls too."""
    tokens = ["<|end_of_text|>", "<|eot_id|>", "</s>", "<|end|>"]
    ends = generation_config(said(tokens, kinds=[3, 3, 1, 3], eos_token_id=0))["eos_token_id"]
    assert ends == [0, 1, 3]
    tokens = ["<|return|>", "<|call|>", "<|end|>"]
    assert generation_config(said(tokens, kinds=[3, 3, 3]))["eos_token_id"] == [0, 1]


def test_every_sampling_key_that_is_written_is_read():
    """The keys are the gguf package's own; numbers are float32 there."""
    names = [
        value.removeprefix("general.sampling.")
        for name, value in vars(gguf.Keys.General).items()
        if name.startswith("SAMPLING_")
    ]
    values = {
        **{
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.05,
            "temp": 0.2,
        },
        **{"penalty_repeat": 1.1, "penalty_last_n": 64, "sequence": "top_k;temperature"},
        **{"xtc_probability": 0.5, "xtc_threshold": 0.25, "mirostat": 2, "mirostat_tau": 5.0},
        **{"mirostat_eta": 0.1},
    }
    assert values.keys() == set(names)
    asked = {f"general.sampling.{name}": value for name, value in values.items()}
    assert generation_config({**said(["a"]), **asked}) == {
        "do_sample": True,
        **{"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 0.2, "repetition_penalty": 1.1},
        **{"penalty_last_n": 64, "sequence": "top_k;temperature"},
        **{"xtc_probability": 0.5, "xtc_threshold": 0.25},
        **{"mirostat": 2, "mirostat_tau": 5.0, "mirostat_eta": 0.1},
    }
    off = {"mirostat": 0, "mirostat_tau": 5.0, "xtc_probability": 0.0, "penalty_last_n": 64}
    asked = {f"general.sampling.{name}": value for name, value in off.items()}
    assert generation_config({**said(["a"]), **asked}) == {}
    assert generation_config({**said(["a"]), "general.sampling.temp": 0.0}) == {"do_sample": False}


def test_sampling_is_as_it_was_written_before_the_file_rounded_it(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_float32("general.sampling.temp", 0.2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = GgufFile(tmp_path / "a.gguf").metadata
    assert generation_config(metadata) == {"do_sample": True, "temperature": 0.2}
