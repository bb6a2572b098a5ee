"""Compiling C++ at its first use: kept libraries, and messages where it fails."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attention.kernels.cpu import compiling, levels, native
from attention.kernels.cpu.layout import LayoutError
from tests.instructions import at


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
        "import sys; from pathlib import Path; from attention.kernels.cpu.native import load; "
        "print(load(Path(sys.argv[1]), Path(sys.argv[2])).answer())"
    )
    command = [sys.executable, "-c", program, str(source), str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [process.communicate(timeout=120)[0] for process in running]


def no_compiler(monkeypatch):
    """Loads the library again; the kept one must be enough."""
    native._attempt.cache_clear()

    def refuse(*arguments):
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiling, "_compile", refuse)


def test_a_compiled_library_is_kept(source, tmp_path, monkeypatch):
    folder = tmp_path / "made" / "kernels"
    assert native.load(source, folder).answer() == 42
    assert len(kept(folder)) == 1
    assert kept(folder)[0].suffix == ".so"
    no_compiler(monkeypatch)
    assert native.load(source, folder).answer() == 42


def test_another_content_compiler_or_level_is_compiled_anew(source, tmp_path, monkeypatch):
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
    if levels.in_force().name != "portable":
        with at("portable"):
            native.load(source, tmp_path / "kernels")
    else:
        monkeypatch.setenv("CXX", "c++ -DANOTHER")
        native.load(source, tmp_path / "kernels")
    assert len(kept(tmp_path / "kernels")) == 5


def test_a_truncated_library_is_compiled_anew(source, tmp_path):
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
    assert native.compiler() == ("env", "c++")
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


def test_a_library_that_the_package_carries_needs_no_compiler(source, tmp_path, monkeypatch):
    level = levels.in_force()
    carried = compiling.packaged(source, level.name, level.arguments)
    carried.parent.mkdir()
    compiling.compiled(source, level.arguments, tmp_path / "built").rename(carried)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert native.origin(source) == "as the package carries it"
    assert native.load(source, tmp_path / "kernels").answer() == 42
    assert not (tmp_path / "kernels").exists()
    write(source, 43)  # which it was not made from
    with pytest.raises(native.NativeError, match=r"no C\+\+ compiler; install one .* or install a wheel"):
        native.origin(source)
    with pytest.raises(native.NativeError, match=r"no C\+\+ compiler"):
        native.load(source, tmp_path / "kernels")


def test_a_level_is_the_highest_that_the_processor_has_or_a_lower_one_by_name(monkeypatch):
    monkeypatch.setattr(levels._InForce, "level", None)
    monkeypatch.setattr(levels._InForce, "loaded", False)
    monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
    level = {level.name: level for level in levels.LEVELS}
    monkeypatch.setattr(levels, "_features", lambda: level["avx512-vnni"].features | {"sse4_2", "avx_vnni"})
    assert levels.in_force().name == "avx512-vnni"
    assert levels.use("x86-64-v3") == levels.in_force() == level["x86-64-v3"]
    assert levels.use("auto").name == levels.in_force().name == "avx512-vnni"
    names = "portable, x86-64-v3, avx-vnni, x86-64-v4, avx512-vnni"
    can = f"choose auto or one that this processor executes: {names}"
    for name, sentence in {
        "avx": "there is no level 'avx' of native code",
        "avx512-bf16": "this processor cannot execute avx512-bf16, since it lacks avx512_bf16",
        "armv8-dotprod": "armv8-dotprod is a level of aarch64, and this is x86_64",
    }.items():
        with pytest.raises(levels.LevelError) as error:
            levels.use(name)
        assert str(error.value) == f"{sentence}; {can}"
    assert levels.in_force().name == "avx512-vnni"
    monkeypatch.setattr(levels, "_features", frozenset)
    monkeypatch.setattr(levels._InForce, "level", None)
    assert levels.in_force().name == "portable"
    monkeypatch.setattr(levels.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(levels, "_features", lambda: frozenset({"fp", "asimd", "asimddp"}))
    assert levels.in_force().name == "armv8-dotprod"


def test_the_matrix_unit_is_there_for_processes_that_get_its_registers(monkeypatch):
    monkeypatch.setattr(levels.Path, "read_text", lambda path: "flags\t: fma amx_tile amx_bf16\n")
    for given in (True, False):
        monkeypatch.setattr(levels, "_may_use_tiles", lambda given=given: given)
        assert ("amx_tile" in levels._features.__wrapped__()) == given
    assert "fma" in levels._features.__wrapped__()


def test_a_level_cannot_be_set_once_code_of_another_is_loaded(source, tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "executable", lambda: levels.LEVELS[:1])
    with at("portable"):
        levels.use("portable")
        native.load(source, tmp_path / "kernels")
        levels.use("portable")
        levels.use("auto")  # the same
        monkeypatch.setattr(levels, "executable", lambda: levels.LEVELS[:2])
        with pytest.raises(RuntimeError, match="level portable is loaded already, and x86-64-v3 would"):
            levels.use("x86-64-v3")
        with pytest.raises(RuntimeError, match="choose the level before native code is first used"):
            levels.use("auto")
        assert levels.in_force().name == "portable"


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ([("a", ctypes.c_int64), ("b", ctypes.c_int32)], None),
        (
            [("b", ctypes.c_int64), ("a", ctypes.c_int32)],
            "in C++ the field a of 8 bytes at 0, in Python b of 8",
        ),
        (
            [("a", ctypes.c_int64), ("b", ctypes.c_int64)],
            "field b of 4 bytes at 8, in Python b of 8 bytes at 8",
        ),
        ([("a", ctypes.c_int64)], "16 bytes in C++, 8 in Python"),
    ],
)
def test_structures_that_differ_are_an_error(fields, difference, tmp_path):
    header = Path(native.__file__).with_name("layout.hpp")
    source = tmp_path / "pair.cpp"
    source.write_text(
        f"""#include "{header}"
        #include <cstdint>
        struct Pair {{ int64_t a; int32_t b; }};
        extern "C" __attribute__((visibility("default"))) const char* longspan_layout() {{
          using Type = Pair;
          static const std::string text =
              described("Pair", sizeof(Pair), {{LONGSPAN_FIELD(a), LONGSPAN_FIELD(b)}});
          return text.c_str();
        }}"""
    )
    structure = type("_Pair", (ctypes.Structure,), {"_fields_": fields})
    if difference is None:
        native.load(source, tmp_path / "kernels", [structure])
        unknown = type("Other", (ctypes.Structure,), {"_fields_": fields})
        with pytest.raises(LayoutError, match="structure Other: there is nothing of this name"):
            native.load(source, tmp_path / "kernels", [unknown])
    else:
        with pytest.raises(LayoutError, match=re.escape(difference)):
            native.load(source, tmp_path / "kernels", [structure])


def test_a_library_that_another_user_could_have_written_is_not_loaded(source, tmp_path, caplog):
    folder = tmp_path / "kernels"
    assert in_other_processes(source, folder, 1) == ["42\n"]
    library = kept(folder)[0]
    evil = tmp_path / "evil.cpp"
    write(evil, 666)
    assert compiling.kept_path(source, levels.in_force().arguments, folder) == library
    compiling._compile(evil, levels.in_force().arguments, tmp_path).replace(library)
    library.chmod(0o775)
    assert native.load(source, folder).answer() == 42
    assert f"{library} is not loaded but compiled again: other users can write it (mode 775)" in caplog.text
    assert kept(folder)[0].stat().st_mode & 0o022 == 0


def test_the_folder_of_libraries_is_this_users_alone(source, tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    mask = os.umask(0)
    try:
        native.load(source, folder)
    finally:
        os.umask(mask)
    assert [path.stat().st_mode & 0o022 for path in (folder, *kept(folder))] == [0, 0]
    folder.chmod(0o777)  # as an older version may have made it
    no_compiler(monkeypatch)
    assert native.load(source, folder).answer() == 42
    assert folder.stat().st_mode & 0o022 == 0


def test_a_folder_of_another_user_is_not_used_and_that_is_said(source, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "kernels"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert native.load(source, folder).answer() == 42
    assert kept(folder) == []
    assert f"compiled kernels in {folder} are not loaded" in caplog.text
    assert "it belongs to user" in caplog.text
    assert "remove that folder, or name another cache folder (LONGSPAN_CACHE_DIR)" in caplog.text
