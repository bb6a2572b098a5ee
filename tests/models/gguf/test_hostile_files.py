"""GGUF files that were made to harm: each is refused in a sentence, and nothing is allocated for a claim."""

import resource
import struct

import numpy as np
import pytest

from server.models.gguf import file as reading
from server.models.gguf.conversion import convert
from server.models.gguf.file import GgufFile
from tests.models.gguf.files import rewrite, write
from tests.models.gguf.zoo import CASES, save

MOST_GROWN = 300 << 20
_UINT8, _UINT32, _STRING, _ARRAY = 0, 4, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, length: int) -> bytes:
    return struct.pack("<IQ", kind, length)


def tensor(*dimensions: int, offset: int = 0, kind: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(b"t") + shape + struct.pack("<IQ", kind, offset)


def whole(tensors: int, keys: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


FILES = {
    "nothing but the name": (b"GGUF", "ends too early"),
    "2**63 keys": (whole(0, 1 << 63), "ends too early"),
    "2**63 tensors": (whole(1 << 63, 0), "ends too early"),
    "a key of 2**63 bytes": (whole(0, 1, struct.pack("<Q", 1 << 63) + b"ab"), "ends too early"),
    "a text of 2**62 bytes": (whole(0, 1, key(b"a", _STRING, struct.pack("<Q", 1 << 62))), "ends too early"),
    "a list of 2**60 bytes": (
        whole(0, 1, key(b"a", _ARRAY, array(_UINT8, 1 << 60)) + bytes(1000)),
        "ends too early",
    ),
    "lists within lists": (whole(0, 1, key(b"a", _ARRAY, array(_ARRAY, 1) * 20_000)), "recursion"),
    "2**40 empty lists": (
        whole(0, 1, key(b"a", _ARRAY, array(_ARRAY, 1 << 40)) + array(_UINT8, 0) * 100),
        "ends too early",
    ),
    "a value of an unknown type": (whole(0, 1, key(b"a", 99, b"")), r"99\) is not a valid"),
    "a key twice": (whole(0, 2, key(b"a", _UINT8, b"\1") * 2), "Duplicate a"),
    "an alignment of 0": (
        whole(0, 1, key(b"general.alignment", _UINT32, bytes(4))),
        "must be a non-zero power of two",
    ),
    "2**31 dimensions": (whole(1, 0, text(b"t") + struct.pack("<I", 1 << 31)), "ends too early"),
    "a shape that overflows": (whole(1, 0, tensor(1 << 32, 1 << 32)), "cannot reshape"),
    "a dimension of 2**64 - 1": (whole(1, 0, tensor(2**64 - 1)), "ends too early"),
    "an offset far outside": (whole(1, 0, tensor(4, offset=1 << 62) + bytes(64)), "ends too early"),
    "a tensor of an unknown type": (whole(1, 0, tensor(4, kind=999)), r"999\) is not a valid"),
    "a version of the future": (whole(0, 0, version=99), "version 99"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_with_a_sentence(name, tmp_path):
    content, sentence = FILES[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as refusal:
        GgufFile(file)
    assert "\n" not in str(refusal.value)


def test_more_values_than_any_vocabulary_has_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_VALUES", 1000)
    file = tmp_path / "model.gguf"
    for length in (900, 1000):
        file.write_bytes(whole(0, 1, key(b"a", _ARRAY, array(_UINT8, length)) + bytes(length)))
        if length == 900:
            assert "a" in GgufFile(file).metadata
            continue
        with pytest.raises(ValueError, match="more than 1,000 values"):
            GgufFile(file)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save(CASES["llama"], folder / "model")
    return write(folder / "model", folder / "llama.gguf", "llama")


@pytest.mark.parametrize(
    ("keys", "tensors", "sentence"),
    [
        ({"llama.embedding_length": 1 << 20}, {}, "another shape than the metadata asks for"),
        ({"llama.feed_forward_length": 1 << 30}, {}, "another shape than the metadata asks for"),
        ({"llama.attention.head_count": 1 << 30}, {}, "not a multiple of the number of attention heads"),
        (
            {"llama.block_count": 2**31 - 1},
            {f"blk.{2**31 - 2}.attn_norm.weight": np.zeros(64, np.float32)},
            "says that it has 2147483647 layers, but it has only",
        ),
    ],
)
def test_claims_beyond_the_tensors_are_refused_before_memory_is_taken(
    keys, tensors, sentence, llama, tmp_path
):
    file = rewrite(llama, tmp_path / "claims.gguf", keys=keys, tensors=tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=sentence):
        convert(file, tmp_path / "converted")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWN >> 10
