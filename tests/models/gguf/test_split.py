import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from server.errors import RefusedError
from server.models.convert import RECORD, read_record
from server.models.gguf.conversion import convert
from server.models.resolve import resolve_model
from tests.models.gguf.files import add_key, close, write
from tests.models.gguf.zoo import CASES, save


@pytest.fixture
def parts(tmp_path):
    """A file in three parts, as llama-gguf-split writes them: the first has the metadata and no tensor."""
    save(CASES["llama"], tmp_path / "model")
    whole = write(tmp_path / "model", tmp_path / "whole.gguf", "llama")
    reader = gguf.GGUFReader(whole)
    half = len(reader.tensors) // 2
    found = []
    for number, tensors in enumerate(([], reader.tensors[:half], reader.tensors[half:])):
        path = tmp_path / f"Tiny-{number + 1:05d}-of-00003.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture" and field.contents() != []:
                add_key(writer, key, field.contents())
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        found.append(close(writer, path))
    return found


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """A process of its own would spend most of its time on imports."""
    monkeypatch.setattr("server.models.convert._convert", lambda file, folder, report: convert(file, folder))


def resolve(file, folder):
    return resolve_model(str(file), folder / "cache", lambda *_: None)


def test_a_split_set_is_read_as_one_from_any_of_its_parts(parts, tmp_path):
    found = resolve(parts[1], tmp_path)
    assert found.name == "tiny"
    own, weights = (
        load_file(tmp_path / "model" / "model.safetensors"),
        load_file(found.folder / "model.safetensors"),
    )
    assert own.keys() == weights.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)
    record = read_record(found.folder)
    assert (record["gguf"], record["size"]) == (str(parts[0]), sum(part.stat().st_size for part in parts))
    assert resolve(parts[2], tmp_path).folder == found.folder
    changed = parts[2].read_bytes()
    parts[2].write_bytes(changed[:-1] + bytes([changed[-1] ^ 1]))
    assert resolve(parts[0], tmp_path).folder != found.folder, "a part has changed"


def test_a_missing_part_is_named(parts, tmp_path):
    parts[1].unlink()
    with pytest.raises(
        RefusedError, match=r"3 files, of which 1 are missing, Tiny-00002-of-00003\.gguf among"
    ):
        resolve(parts[0], tmp_path)


def test_parts_under_each_others_names_are_refused(parts, tmp_path):
    parts[1].rename(tmp_path / "x")
    parts[2].rename(parts[1])
    (tmp_path / "x").rename(parts[2])
    with pytest.raises(ValueError, match=r"Tiny-00002-of-00003\.gguf says that it is part 3 of 3"):
        resolve(parts[0], tmp_path)


def test_a_part_under_another_name_is_refused(parts, tmp_path):
    moved = parts[0].rename(tmp_path / "moved.gguf")
    with pytest.raises(
        ValueError, match=r"moved\.gguf says that it is part 1 of 3; give the files of a split"
    ):
        resolve(moved, tmp_path)


def test_a_part_that_is_no_gguf_file_is_refused(parts, tmp_path):
    parts[2].write_text("<!doctype html>")
    with pytest.raises(RefusedError, match=r"Tiny-00003-of-00003\.gguf is no GGUF file"):
        resolve(parts[0], tmp_path)


def test_links_keep_their_own_names(parts, tmp_path):
    """As in the hub's cache, whose files are links to blobs with hashes for names."""
    (tmp_path / "blobs").mkdir()
    for number, part in enumerate(parts):
        part.symlink_to(part.rename(tmp_path / "blobs" / f"{number}abc"))
    found = resolve(parts[1], tmp_path)
    assert (found.name, read_record(found.folder)["gguf"]) == ("tiny", str(parts[0]))


def test_a_name_may_be_as_long_as_those_of_files(parts, tmp_path):
    whole = (tmp_path / "whole.gguf").rename(tmp_path / f"{'长' * 80}.gguf")
    assert resolve(whole, tmp_path).name == "长" * 80


def test_a_gguf_file_needs_no_ending(parts, tmp_path):
    whole = (tmp_path / "whole.gguf").rename(tmp_path / "sha256-v1.5")
    assert resolve(whole, tmp_path).name == "sha256-v1.5"


@pytest.mark.parametrize("name", ["x-00000-of-00000.gguf", "x-00003-of-00002.gguf"])
def test_a_number_outside_of_the_set_is_refused(name, parts, tmp_path):
    moved = parts[0].rename(tmp_path / name)
    with pytest.raises(RefusedError, match=r"its name says that it is part \d of \d; give it the name that"):
        resolve(moved, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_conversion_says_how_it_is_made_again(name, parts, tmp_path):
    folder = resolve(parts[0], tmp_path).folder
    (folder / name).unlink()
    with pytest.raises(RefusedError, match=rf"{name} is missing or damaged; delete {folder}, and it will be"):
        resolve(parts[0], tmp_path)
    shutil.rmtree(folder)
    assert resolve(parts[0], tmp_path).folder == folder
    os.truncate(folder / "model.safetensors", 1000)
    (folder / RECORD).write_text(json.dumps({**read_record(folder), "mtime_ns": 0}))  # as if moved
    with pytest.raises(RefusedError, match=r"model\.safetensors is missing or damaged"):
        resolve(parts[0], tmp_path)


def test_a_moved_file_is_served_from_a_cache_that_cannot_be_written(parts, tmp_path, monkeypatch, caplog):
    whole = tmp_path / "whole.gguf"
    folder = resolve(whole, tmp_path).folder
    (tmp_path / "elsewhere").mkdir()
    moved = whole.rename(tmp_path / "elsewhere" / "whole.gguf")

    def refuse(*_):
        raise OSError("Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert resolve(moved, tmp_path).folder == folder
    assert "is read as a whole at every start" in caplog.text
