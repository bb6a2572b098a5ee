"""Client commands start fast, and run where the server's dependencies are not installed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.scripted import Running

LONGSPAN = str(Path(sys.executable).parent / "longspan")

_PROGRAM = """
import contextlib, io, json, sys
from importlib.machinery import PathFinder
blocked, commands = map(json.loads, sys.argv[1:])
class WithoutServer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutServer
from loadtest.cli.__main__ import main
for arguments in commands:
    sys.argv = ["longspan", *arguments]
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main() or 0
        except SystemExit as end:
            code = end.code or 0
        out.flush(), errors.flush()
    print(json.dumps([code, *(stream.buffer.getvalue().decode() for stream in (out, errors))]))
"""
SERVER_ONLY = ("torch", "transformers", "accelerate", "gguf", "pydantic_settings", "msgspec", "psutil")
SERVER_ONLY += ("prometheus_client", "safetensors", "sentencepiece", "tiktoken", "wonderwords")
LOAD = ("numpy", "httpx2", "uvloop", "jinja2", "markupsafe", "tokenizers")


class Done(NamedTuple):
    """What came of a command."""

    returncode: int
    stdout: str
    stderr: str


def run_without_server(*commands: list[str], blocked: tuple[str, ...] = SERVER_ONLY + LOAD) -> list[Done]:
    """Commands, one after another in one process in which these packages can't be imported."""
    program = [sys.executable, "-c", _PROGRAM, json.dumps(blocked), json.dumps(commands)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    outcomes = [Done(*json.loads(line)) for line in done.stdout.splitlines()]
    assert not any("Traceback" in each.stderr for each in outcomes), outcomes
    return outcomes


def test_client_commands_need_no_server_extra(server: Running) -> None:
    port = ["--port", str(server.port)]
    done = run_without_server(
        *(["--help"], ["generate", "--help"]),
        *(["generate", "abc", *port], ["health", *port], ["read", __file__, *port]),
    )
    assert [each.returncode for each in done] == [0] * 5, done
    assert done[2].stdout == "cba"


def test_a_load_is_put_on_a_server_without_the_server_extra(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abcdef", "output_tokens": 6}\n')
    load = ["load", "--port", str(server.port), "--no-metrics", "--workload", str(file), "--requests", "4"]
    done, *refused = run_without_server(
        [*load, "--concurrency", "2"],
        [*load, "--repeats", "2"],
        [*load, "--endpoint", "http://a/v1", "--endpoint-model", "m"],
    )
    assert "2 users" in done.stdout, done.stderr
    assert [each.returncode for each in refused] == [1, 1]
    assert "intervals across --repeats need numpy; run: pip install 'longspan[load]'" in refused[0].stderr
    assert "--endpoint needs httpx2" in refused[1].stderr


def test_only_the_load_extra_is_needed_for_a_load(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abcdef", "output_tokens": 6}\n')
    files = {name: tmp_path / f"load.{name}" for name in ("json", "csv", "html", "svg")}
    load = ["load", "--port", str(server.port), "--no-metrics", "--workload", str(file), "--requests", "4"]
    load += ["--concurrency", "2", "--repeats", "2"]
    load += [word for name, path in files.items() for word in (f"--{name}", str(path))]
    (done,) = run_without_server(load, blocked=SERVER_ONLY)
    assert len(json.loads(files["json"].read_text())["runs"]) >= 2, done.stderr
    assert all(path.stat().st_size for path in files.values())


def test_server_commands_say_what_to_install() -> None:
    commands = (["serve"], ["serve", "--help"], ["models", "list"], ["models", "pull"], ["backends"])
    for command, done in zip(commands, run_without_server(*commands), strict=True):
        assert done.returncode == 1, command
        assert "pip install 'longspan[server]'" in done.stderr, command


def cpu_seconds(*command: str) -> float:
    """Processor time of a command: the machine may be busy with other things."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    subprocess.run(command, capture_output=True, timeout=120)
    return used() - before


@pytest.fixture(scope="module")
def needed() -> float:
    """What Python and the packages that no client can do without take, on this machine."""
    command = (sys.executable, "-c", "import grpc, grpc.aio, google.protobuf, typer, rich.console")
    return min(cpu_seconds(*command) for _ in range(3))


@pytest.mark.parametrize(
    "command",
    [
        ["--version"],
        ["generate", "hi"],
        pytest.param(["--help"], marks=pytest.mark.stress),  # the first test has its imports, too
        pytest.param(["health"], marks=pytest.mark.stress),
    ],
)
def test_client_commands_are_fast(command: list[str], needed: float) -> None:
    arguments = command if command[0].startswith("-") else [*command, "--port", "1"]
    # A call takes twice as long; torch alone would take ten times.
    assert any(cpu_seconds(LONGSPAN, *arguments) < 5 * needed for _ in range(2))
