"""Compiling C++ when first used: what is kept, and what is said where it can't be done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attention.kernels.cpu import native


@pytest.fixture(autouse=True)
def forgetful():
    native._attempt.cache_clear()
    yield
    native._attempt.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    write(path, 42)
    return path


def write(path: Path, number: int | str, before: str = "") -> None:
    path.write_text(
        f'{before}extern "C" __attribute__((visibility("default"))) int answer() {{ return {number}; }}\n'
    )


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def in_other_processes(source: Path, folder: Path, count: int) -> list[str]:
    program = (
        "import runpy, sys; from pathlib import Path; load = runpy.run_path(sys.argv[1])['load']; "
        "print(load(Path(sys.argv[2]), Path(sys.argv[3])).answer())"
    )
    command = [sys.executable, "-c", program, native.__file__, str(source), str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [process.communicate(timeout=120)[0] for process in running]


def no_compiler(monkeypatch):
    """Another look at what is kept, which must be enough."""
    native._attempt.cache_clear()

    def refuse(*arguments):
        raise AssertionError("compiled again")

    monkeypatch.setattr(native, "_compile", refuse)


def test_what_is_compiled_once_is_kept(source, tmp_path, monkeypatch):
    folder = tmp_path / "made" / "kernels"
    assert native.load(source, folder).answer() == 42
    assert len(kept(folder)) == 1
    assert kept(folder)[0].suffix == ".so"
    no_compiler(monkeypatch)
    assert native.load(source, folder).answer() == 42


def test_another_content_compiler_or_processor_is_compiled_anew(source, tmp_path, monkeypatch):
    included = tmp_path / "number.hpp"
    included.write_text("constexpr int number = 43;")
    (tmp_path / "between.hpp").write_text('#include "number.hpp"\n')
    native.load(source, tmp_path / "kernels")
    write(source, "number", '#include "between.hpp"\n')
    assert native.load(source, tmp_path / "kernels").answer() == 43
    included.write_text("constexpr int number = 44;")
    assert native.load(source, tmp_path / "kernels").answer() == 44
    monkeypatch.setenv("CXX", "c++ -DOTHER")
    native.load(source, tmp_path / "kernels")
    native._attempt.cache_clear()
    monkeypatch.setattr(native, "_processor", lambda: ("other",))
    native.load(source, tmp_path / "kernels")
    assert len(kept(tmp_path / "kernels")) == 5


def test_what_was_cut_short_is_compiled_anew(source, tmp_path):
    folder = tmp_path / "kernels"
    # In another process: a file that this one has loaded must not change under it.
    assert in_other_processes(source, folder, 1) == ["42\n"]
    kept(folder)[0].write_bytes(b"")
    assert native.load(source, folder).answer() == 42
    assert kept(folder)[0].stat().st_size > 0


def test_a_folder_that_cannot_be_made_is_no_hindrance(source, tmp_path):
    (tmp_path / "file").touch()
    assert native.load(source, tmp_path / "file" / "kernels").answer() == 42


def test_many_processes_at_once(source, tmp_path):
    assert in_other_processes(source, tmp_path / "kernels", 3) == ["42\n"] * 3
    assert len(kept(tmp_path / "kernels")) == 1


def test_the_first_error_is_told(source, tmp_path):
    source.write_text("int answer() { return nothing; }\nint other() { return neither; }\n")
    with pytest.raises(native.NativeError, match=r"cannot compile answer\.cpp: .*error: .nothing.") as error:
        native.load(source, tmp_path / "kernels")
    assert "neither" not in str(error.value)
    assert kept(tmp_path / "kernels") == []


def test_the_compiler_may_be_named(monkeypatch):
    monkeypatch.setenv("CXX", "env c++")
    assert native.compiler() == ["env", "c++"]
    monkeypatch.setenv("CXX", "c+++")
    with pytest.raises(native.NativeError, match="CXX names c\\+\\+\\+, which is not there"):
        native.compiler()


def test_a_compiler_that_is_none(source, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(native.NativeError, match=r"cannot compile answer\.cpp: exit status 3"):
        native.load(source, tmp_path / "kernels")
    os.remove(broken)
    broken.mkdir()
    with pytest.raises(native.NativeError, match="which is not there"):
        native.load(source, tmp_path / "kernels")
