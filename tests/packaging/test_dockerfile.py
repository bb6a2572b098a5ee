"""Faults that would fail a Docker build, as far as they show without Docker; hadolint checks the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import Settings
from tests.command import longspan

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Keyword and rest of every instruction, continuation lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def context_copies() -> list[list[str]]:
    copies = [rest.split() for keyword, rest in instructions() if keyword == "COPY"]
    return [copy[:-1] for copy in copies if not copy[0].startswith("--from")]


def command_line(keyword: str) -> list[str]:
    (found,) = (rest for name, rest in instructions() if name == keyword)
    return json.loads(found[found.index("[") :])


def run_steps() -> list[str]:
    return [rest for keyword, rest in instructions() if keyword == "RUN"]


def test_copied_files_exist_and_reach_the_build() -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for sources in context_copies():
        for source in sources:
            assert (ROOT / source).exists()
            assert f"!{source}" in sent


def test_the_wheel_builds_from_only_the_copied_files(tmp_path: Path) -> None:
    for sources in context_copies():
        for source in sources:
            origin = ROOT / source
            if origin.is_dir():
                shutil.copytree(origin, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(origin, tmp_path)
    # Compiles nothing, so that it is quick: it makes the file that is asked for, its last argument.
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done; [ "$last" = --version ] || : >"$last"\n')
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    environment = {name: value for name, value in os.environ.items() if name != "LONGSPAN_CACHE_DIR"}
    environment["CXX"] = str(compiler)
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120, env=environment)
    assert len(list(tmp_path.glob("dist/longspan-*.whl"))) == 1
    assert any('"$(echo dist/longspan-*.whl)[server,otel]"' in step for step in run_steps())


@pytest.mark.parametrize(
    ("device", "index", "pinned", "options"),
    [
        ("cpu", "", "torch==2.13.0", ""),
        ("cpu", "file:///x", "torch==2.13.0+cpu", "--extra-index-url file:///x "),
        ("cuda", "", "torch==2.13.0", ""),
    ],
)
def test_the_device_chooses_the_torch_build(
    tmp_path: Path, device: str, index: str, pinned: str, options: str
) -> None:
    done = run_torch_step(tmp_path, device, index)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"-m venv {tmp_path / 'longspan'}",
        "install --require-hashes --no-deps -r requirements.lock",
        f"install {options}-c constraints.txt torch",
    ]
    assert pinned in (tmp_path / "constraints.txt").read_text().splitlines()
    assert ("TORCH_INDEX_URL names no index" in done.stderr) == (device == "cpu" and not index)


def test_an_unknown_device_ends_the_build(tmp_path: Path) -> None:
    done = run_torch_step(tmp_path, "tpu", "")
    assert done.returncode != 0
    assert "DEVICE is cpu or cuda, not tpu" in done.stderr


def run_torch_step(folder: Path, device: str, index: str) -> subprocess.CompletedProcess[str]:
    """The RUN that installs torch, under sh, with a python and a pip that only show how they are called."""
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / "longspan" / "bin").mkdir(parents=True)
    for tool in (folder / "python", folder / "longspan" / "bin" / "pip"):
        tool.write_text('#!/bin/sh\necho "$@"\n')
        tool.chmod(0o755)
    step = next(step for step in run_steps() if "$DEVICE" in step)
    step = step.replace("/opt/longspan", str(folder / "longspan"))
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "DEVICE": device, "TORCH_INDEX_URL": index}
    return subprocess.run(["sh", "-c", step], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_image_for_cuda_has_the_c_compiler_that_triton_needs(tmp_path: Path, device: str) -> None:
    for tool in ("apt-get", "rm"):
        (tmp_path / tool).write_text(f'#!/bin/sh\necho {tool} "$@"\n')
        (tmp_path / tool).chmod(0o755)
    image = [index for index, (keyword, _) in enumerate(instructions()) if keyword == "FROM"][-1]
    arguments = [rest for keyword, rest in instructions()[image:] if keyword == "ARG"]
    assert arguments == ["DEVICE=cpu"], "an argument of the build stage is unknown in the other"
    (step,) = (rest for keyword, rest in instructions()[image:] if keyword == "RUN" and "$DEVICE" in rest)
    done = subprocess.run(
        ["sh", "-c", step],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (" gcc libc6-dev\n" in done.stdout) == (device == "cuda")
    assert bool(done.stdout) == (device == "cuda")


def test_only_the_build_has_a_cpp_compiler() -> None:
    _, build, image = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert "g++" in build
    assert "g++" not in image


def test_the_containers_commands_are_understood() -> None:
    assert command_line("ENTRYPOINT") == ["longspan"]
    for arguments in (command_line("CMD"), command_line("HEALTHCHECK")[1:]):
        # --help after all flags: the flags before it must be right for it to be shown
        done = longspan(*arguments, "--help")
        assert done.returncode == 0, done.stderr
    assert command_line("HEALTHCHECK") == ["longspan", "health", "--http"], (
        "tests/e2e/test_connections.py runs it"
    )


def test_the_images_default_is_refused_unless_it_is_said_to_be_insecure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [*command_line("CMD"), "--model", "/nowhere", "--port", "0", "--metrics-port", "0"]
    for name in [name for name in os.environ if name.startswith("LONGSPAN_")]:
        monkeypatch.delenv(name)
    done = longspan(*command)
    assert done.returncode != 0
    assert "without TLS and showing who" in done.stderr
    # Where the word for it is given, the next fault is told; an engine's process is started before.
    monkeypatch.setenv("LONGSPAN_INSECURE", "true")
    program = str(Path(sys.executable).parent / "longspan")
    done = subprocess.run([program, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "/nowhere" in done.stderr


def test_ports_volume_and_user() -> None:
    found = dict(instructions())
    fields = Settings.model_fields
    assert found["EXPOSE"].split() == [str(fields["port"].default), str(fields["metrics_port"].default)]
    assert f"LONGSPAN_CACHE_DIR={found['VOLUME']}" in found["ENV"]
    assert found["USER"] != "root"
    steps = [keyword for keyword, _ in instructions()]
    assert steps.index("USER") > max(
        index for index, keyword in enumerate(steps) if keyword in ("RUN", "COPY")
    )
