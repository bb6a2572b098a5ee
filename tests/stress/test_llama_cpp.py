"""GGUF files against llama.cpp itself: tokens of real texts, and log probabilities."""

import json
import pydoc_data.topics
import random
from pathlib import Path
from statistics import mean

import pytest
from transformers import AutoTokenizer

from server.models.gguf.conversion import convert
from tests.gguf_blocks import blocks
from tests.models.gguf.files import write
from tests.models.gguf.zoo import CASES, LENGTH, ORIGINAL, save
from tests.models_zoo import VOCABULARY
from tests.stress.llama_cpp import LlamaCpp, differences, in_float32

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

TEXTS = [
    *list(pydoc_data.topics.topics.values())[:30],
    "Grüße aus Zürich — 東京、こんにちは! Привет, мир. مرحبا 🙂👩‍👩‍👧‍👦 e\u0301 ﬁ ½ ①",
    "x = 1234567.89e-10  # tabs\t\tand   spaces \r\n\r\n\n  end  ",
    "I'll they've CAN'T we'd 'tis rock'n'roll",
    " leading, trailing ",
    "\x00\x7f\u200b\ufeff\xa0",
]

TOKENS = random.Random(0).choices(range(3, VOCABULARY), k=LENGTH)

# Where llama.cpp itself does not compute what the model does.
KNOWN = {
    "llama, yarn": "llama.cpp reads rope.scaling.yarn_beta_fast and _slow for grok and mistral3 only",
    "llama, yarn with a factor": "llama.cpp reads rope.scaling.yarn_attn_factor for grok only",
    "mistral": "llama.cpp gives the llama architecture no window",
    "phi3": "llama.cpp gives phi3 no window",
    "starcoder2, no biases": "llama.cpp asks for these biases",
    "command-r, norms": "llama.cpp reads these norms in models of 64 layers and more only",
    "gpt-oss": "llama.cpp rounds the bounds of yarn, which gpt-oss does not (truncate: false)",
    "exaone4": "llama.cpp gives exaone4 a window in models of 64 layers only",
}
# llama.cpp looks this function up in a table of 16-bit numbers.
GELU = ("phi2", "starcoder2", "gpt2", "gptneox", "gptneox, in sequence", "gemma", "gemma2", "gemma3")


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
    case = CASES["llama"]
    save(case._replace(config={**case.config, "hidden_size": 256}), tmp_path / "model")
    plain = write(tmp_path / "model", tmp_path / "plain.gguf", case.architecture)
    embedding = {"token_embd.weight": (name, blocks(name, VOCABULARY, 256))}
    file = in_float32(plain, tmp_path / "model.gguf", embedding)
    convert(file, tmp_path / "converted")
    found = differences(file, tmp_path / "converted", TOKENS[:40], [1, 2, 3, 20, 39])
    assert max(found) < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(reason=KNOWN[name], strict=True))
        if name in KNOWN
        else name
        for name in CASES
    ],
)
def test_every_architecture_computes_the_same(name, tmp_path):
    """Served from the file, in float32, before and beyond all windows and scalings."""
    case = CASES[name]
    save(case, tmp_path / "model")
    file = write(tmp_path / "model", tmp_path / "model.gguf", case.architecture, case.keys)
    convert(file, tmp_path / "converted")
    after = [1, 5, 13, 30, ORIGINAL + 1, 60, LENGTH - 1]
    if name == "phi3, longrope":  # llama.cpp's factors go by the context's size, not by a text's
        after = [count for count in after if count > ORIGINAL]
    found = differences(file, tmp_path / "converted", TOKENS, after)
    assert max(found) < (5e-3 if name in GELU else 1e-4)
