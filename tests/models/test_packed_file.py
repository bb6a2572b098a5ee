"""The file that packed weights are kept in: whole or refused, also where writing it is interrupted."""

import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from server.models.packed_file import BrokenFileError, read, write

DESCRIPTION = {"version": 1, "named": {"é": [1, 0.1, None]}}
DTYPES = [torch.uint8, torch.float16, torch.float32]


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"codes": (3, 2, 8, 16, 4), "scales": (3, 2, 1, 16), "odd": (7,), "scalar": (), "empty": (0, 4)}
    return {
        name: torch.randint(256, shape, generator=generator).to(dtype)
        for (name, shape), dtype in zip(shapes.items(), [*DTYPES, *DTYPES[::-1]], strict=False)
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(DTYPES)), max_size=6),
    seed=st.integers(0, 2**31),
)
def test_tensors_are_read_as_written_to_the_last_bit(shapes, seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    # Any bits, NaN among them.
    written = {
        f"{number}": torch.randint(256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
        .view(dtype)
        .squeeze(-1)
        for number, (shape, dtype) in enumerate(shapes)
    }
    write(tmp_path / "file", DESCRIPTION, written)
    description, found = read(tmp_path / "file")
    assert description == DESCRIPTION
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
        assert tensor.numel() == 0 or found[name].data_ptr() % tensor.itemsize == 0


def test_large_tensors_are_aligned_and_other_programs_can_read_them(tmp_path):
    write(tmp_path / "file", DESCRIPTION, tensors())
    _, found = read(tmp_path / "file")
    assert found["codes"].data_ptr() % 64 == 0
    assert same(load_file(tmp_path / "file"), tensors())


def test_any_changed_byte_and_any_missing_end_is_noticed(tmp_path):
    file = tmp_path / "file"
    write(file, DESCRIPTION, tensors())
    whole = file.read_bytes()
    assert same(read(file)[1], tensors())
    padding = whole.index(b" " * 8) if b" " * 8 in whole else len(whole)
    for place in [*range(0, padding, 7), *range(len(whole) - 1500, len(whole), 31)]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(BrokenFileError):
            read(file)
    for length in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(BrokenFileError):
            read(file)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        read(file)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write(file, DESCRIPTION, tensors())

    def full(_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            write(file, {}, tensors(1))
    assert same(read(file)[1], tensors())
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    write(file, {}, tensors(1))
    assert same(read(file)[1], tensors(1))


def test_a_new_file_does_not_change_tensors_that_were_read(tmp_path):
    file = tmp_path / "file"
    write(file, DESCRIPTION, tensors())
    _, found = read(file)
    write(file, DESCRIPTION, tensors(1))
    assert same(found, tensors())
    found["codes"].zero_()  # a private map: the file does not change
    assert same(read(file)[1], tensors(1))


def test_readers_among_writers_see_whole_files(tmp_path):
    file = tmp_path / "file"
    write(file, {"seed": 0}, tensors(0))
    failures = []

    def write_many(seed):
        try:
            for _ in range(10):
                write(file, {"seed": seed}, tensors(seed))
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write_many, args=(seed,)) for seed in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        description, found = read(file)
        assert same(found, tensors(description["seed"]))
    assert failures == []
