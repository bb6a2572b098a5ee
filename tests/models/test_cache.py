import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from server.errors import RefusedError
from server.models.cache import make_once


def ignore(stage, fraction):
    pass


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def make_slowly(target: Path, log: Path, seconds: float) -> None:
    def make(partial: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        partial.mkdir()
        (partial / "half").write_text("1")
        time.sleep(seconds)
        (partial / "whole").write_text("2")

    make_once(target, make, ignore)


def start(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=make_slowly, args=arguments)
    process.start()
    return process


def test_only_one_of_several_processes_makes_it(tmp_path):
    target, log = tmp_path / "cache" / "model", tmp_path / "log"
    processes = [start(target, log, 0.5) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "made\n"
    assert contents(target.parent) == ["model"]
    assert contents(target) == ["half", "whole"]


def test_a_killed_process_leaves_nothing_that_counts(tmp_path):
    target, log = tmp_path / "cache" / "model", tmp_path / "log"
    process = start(target, log, 60)
    try:
        end = time.monotonic() + 60
        while not (target.with_name(".model.partial") / "half").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
    assert not target.exists()
    make_slowly(target, log, 0)
    assert contents(target.parent) == ["model"]
    assert contents(target) == ["half", "whole"]


def test_a_failure_leaves_nothing(tmp_path):
    def make(partial: Path) -> None:
        partial.write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        make_once(tmp_path / "file", make, ignore)
    assert contents(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RefusedError, match=r"file.* can't hold the model .*--cache-dir"):
        make_once(tmp_path / "file" / "model", lambda partial: None, ignore)
