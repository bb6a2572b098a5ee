"""Conversions that fail: whose fault it is, is said."""

import json
import resource
import sys

import pytest

from server.errors import RefusedError
from server.models.conversions import ConversionError, run_conversion
from server.models.resolve import resolve_model
from server.models.tokenizing.files import find_tokenizer
from tests.models.gguf.files import write
from tests.models_zoo import save_tiny


def ignore(*_):
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def full_disk():
    """After it is called, no file may grow beyond some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Less than the weights; less than the tokenizer.
@pytest.mark.parametrize("size", [100_000, 2000])
def test_a_full_disk_is_not_the_files_fault(size, tiny, full_disk, tmp_path):
    file = write(tiny, tmp_path / "tiny.gguf", "llama")
    full_disk(size)
    with pytest.raises(RefusedError, match=r"models can't hold the model .*; make room there or choose"):
        resolve_model(str(file), tmp_path / "cache", ignore)


def test_nor_is_it_the_tokenizers(tiny, full_disk, tmp_path):
    model = json.loads((tiny / "tokenizer.json").read_text())["model"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    full_disk(2000)
    with pytest.raises(RefusedError, match=r"tokenizers can't hold the model .*; make room there or choose"):
        find_tokenizer(tmp_path, tmp_path / "cache", ignore)


def test_a_killed_conversion_is_not_explained_by_its_earlier_output(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho a harmless warning >&2\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(
        ConversionError, match=r"^the conversion was ended by signal 9, as .* memory runs out"
    ):
        run_conversion("any", tmp_path, tmp_path / "target", ignore)
