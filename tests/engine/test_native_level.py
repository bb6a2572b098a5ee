"""The level of native code as a setting: what is said of it at start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import pytest
import torch

from attention.kernels.cpu import calls, levels
from server.engine.build import build_engine
from server.engine.native import set_native_level
from server.errors import RefusedError
from server.settings import Settings
from tests.instructions import at
from tests.models_zoo import save_tiny


def start(folder: Path, **given: str) -> None:
    settings = Settings(device="cpu", kv_memory="4MiB", threads=torch.get_num_threads(), **given)
    build_engine(settings, folder, lambda stage, fraction: None)


def test_settings_know_every_level() -> None:
    annotation = Settings.model_fields["native_level"].annotation
    assert get_args(annotation) == ("auto", *(level.name for level in levels.LEVELS))


def test_a_level_by_name_is_in_force_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    caplog.set_level(logging.INFO, "longspan.engine")
    with at("auto"):
        start(folder, native_level="portable")
        assert levels.in_force().name == "portable"
    names = ", ".join(level.name for level in levels.executable())
    assert "native code is of level portable, compiled here at first use, by " in caplog.text
    assert f"; this processor executes {names}" in caplog.text


def test_a_level_beyond_the_processor_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "_features", frozenset)
    with (
        at("auto"),
        pytest.raises(
            RefusedError, match=r"--native-level: (this processor cannot|.* is a level of ).*portable$"
        ),
    ):
        start(tmp_path / "nothing", native_level="x86-64-v3")


def test_without_a_compiler_there_is_one_warning_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with at("auto"):
        code = set_native_level(Settings())
        assert not code.origin
        start(folder)
        with pytest.raises(Exception, match="install one"):
            calls.compiled()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("there is no native code: there is no C++ compiler; install one (")
    assert warnings[0] == str(code)


def test_an_old_compiler_gets_the_highest_level_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    highest = levels.executable()[-1]
    if not highest.arguments or levels.below(highest) is None:
        pytest.skip("this processor executes only one level")
    old = tmp_path / "old-c++"
    refused = " ".join(highest.arguments)
    old.write_text(f'#!/bin/sh\ncase "$*" in *"{refused}"*) exit 1;; esac\nexec c++ "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with at("auto"):
        code = set_native_level(Settings(device="cpu"))
    assert code.level != highest.name
    assert not code.obstacle
    assert f"too old for level {highest.name} of this processor" in caplog.text
