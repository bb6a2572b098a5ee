"""Special tokens in texts, spaces around them, and ends of generation, beside llama.cpp itself.

What SentencePiece decides is compared with SentencePiece, in tests/models.
"""

import json
import random

import numpy as np
import pytest

from server.models.gguf.file import GgufFile
from server.models.gguf.tokenizer import read_tokenizer
from tests.models.gguf.files import rewrite, write
from tests.models.gguf.test_sentencepiece import TEXTS, metadata, train
from tests.models_zoo import save_tiny
from tests.stress.llama_cpp import LlamaCpp

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]

CONTROL = ["<turn>", "<|im_end|>"]
OPTIONS = [
    {},
    {"add_dummy_prefix": False},
    {"add_dummy_prefix": False, "user_defined_symbols": ["<ud>", "aaa"]},
]


def texts():
    chosen = random.Random(0)
    pieces = [*CONTROL, "<s>", "</s>", "<unk>", *TEXTS[:40]]
    return [*TEXTS[:150], *("".join(chosen.choices(pieces, k=4)) for _ in range(150))]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_sentencepiece_vocabularies(options, tmp_path):
    processor = train(control_symbols=CONTROL, **options)
    said = {key: value for key, value in metadata(processor).items() if value != []}
    del said["tokenizer.ggml.remove_extra_whitespaces"]
    check(said, len(said["tokenizer.ggml.tokens"]), tmp_path)


def check(said, size, folder):
    table = np.zeros((size, 64), np.float32)
    source = write(save_tiny("llama", folder / "llama"), folder / "source.gguf", "llama")
    gone = ("tokenizer.ggml.merges", "tokenizer.ggml.pre", "llama.vocab_size")
    file = rewrite(
        source,
        folder / "file.gguf",
        keys={**dict.fromkeys(gone), **said},
        tensors={"token_embd.weight": table, "output.weight": None},
    )
    tokenizer = read_tokenizer(file, GgufFile(file).metadata)
    with LlamaCpp(file) as oracle:
        for text in texts():
            if text:
                assert tokenizer(text)["input_ids"] == oracle.tokens(text, special=True), json.dumps(text)
