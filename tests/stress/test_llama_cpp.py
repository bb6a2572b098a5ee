"""GGUF files against llama.cpp itself: tokens of real texts, and log probabilities."""

import json
import pydoc_data.topics
import random
from pathlib import Path
from statistics import mean

import pytest
from transformers import AutoTokenizer

from server.models.convert import convert_once
from tests.models_zoo import VOCABULARY
from tests.stress.llama_cpp import LlamaCpp, differences, in_float32
from tests.stress.tiny_gguf import write_llama

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

TEXTS = [
    *list(pydoc_data.topics.topics.values())[:30],
    "Grüße aus Zürich — 東京、こんにちは! Привет, мир. مرحبا 🙂👩‍👩‍👧‍👦 e\u0301 ﬁ ½ ①",
    "x = 1234567.89e-10  # tabs\t\tand   spaces \r\n\r\n\n  end  ",
    "I'll they've CAN'T we'd 'tis rock'n'roll",
    " leading, trailing ",
    "\x00\x7f\u200b\ufeff\xa0",
]


@pytest.fixture(scope="module")
def file(default_model):
    """The default model's GGUF file."""
    return Path(json.loads((default_model / "longspan.json").read_text())["gguf"])


@pytest.fixture(scope="module")
def tokenizer(default_model):
    return AutoTokenizer.from_pretrained(default_model)


def test_tokens_of_real_texts(file, tokenizer):
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], tokenize=False)
    with LlamaCpp(file) as oracle:
        for text in TEXTS:
            assert tokenizer.encode(text) == oracle.tokens(text)
        assert tokenizer.encode(chat) == oracle.tokens(chat, special=True)


def test_log_probabilities_of_the_very_weights(file, default_model, tokenizer, tmp_path):
    """Both compute in float32; llama.cpp sums the probabilities of 49,152 tokens one after another."""
    tokens = tokenizer.encode(pydoc_data.topics.topics["compound"])[:600]
    whole = in_float32(file, tmp_path / "whole.gguf")
    try:
        found = differences(whole, default_model, tokens, [*range(1, 40), 100, 255, 256, 257, 400, 599])
    finally:
        whole.unlink()
    assert max(found) < 1e-3


def test_log_probabilities_of_the_file_itself(file, default_model, tokenizer):
    """llama.cpp rounds activations to 8 bits, as --weights auto does and --weights float does not."""
    tokens = tokenizer.encode(pydoc_data.topics.topics["compound"])[:600]
    found = differences(file, default_model, tokens, [*range(1, 40), 100, 255, 256, 257, 400, 599])
    assert mean(found) < 0.15


BLOCKS = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL MXFP4 TQ2_0"


@pytest.mark.parametrize("name", BLOCKS.split())
def test_every_type_of_block_says_the_same(name, tmp_path):
    """In the embedding, whose rows llama.cpp looks up without rounding anything."""
    file = write_llama(tmp_path / f"{name}.gguf", embedding=name)
    folder = convert_once(file, name, "a test", tmp_path, lambda stage, fraction: None)
    tokens = random.Random(0).choices(range(3, VOCABULARY), k=40)
    found = differences(file, folder, tokens, [1, 2, 3, 20, 39])
    assert max(found) < 1e-4
