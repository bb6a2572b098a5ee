from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.command import longspan

LONGSPAN = str(Path(sys.executable).parent / "longspan")


def run(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [LONGSPAN, "models", *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


def test_an_empty_cache(tmp_path: Path) -> None:
    done = run("list", "--cache-dir", str(tmp_path), home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"There are no models in {tmp_path}; get the default one: longspan models pull" in done.stderr


def test_models_of_the_hub_are_listed(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    done = run("list", "--cache-dir", str(tmp_path / "own"), home=tmp_path)
    assert done.returncode == 0
    header, line = done.stdout.splitlines()
    assert header.split() == ["Model", "Size", "Source", "Folder"]
    assert line.split() == ["acme/tiny", "2", "bytes", "hub", str(snapshot)]


def test_pulling_a_model_that_is_not_there(tmp_path: Path) -> None:
    for name in ("nosuch", "acme/nosuch"):
        done = run("pull", name, "--cache-dir", str(tmp_path), home=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("longspan: ")
        assert name in done.stderr
        assert "Traceback" not in done.stderr


def test_a_setting_that_is_wrong() -> None:
    done = longspan("models", "list", environment={"LONGSPAN_PORT": "x"})
    assert done.returncode == 2
    assert "$LONGSPAN_PORT: should be a valid integer" in done.stderr
