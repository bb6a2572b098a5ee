"""Client commands start fast, and run where the server's dependencies are not installed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripted import Running

LONGSPAN = str(Path(sys.executable).parent / "longspan")

_PREFIX = """
import sys
from importlib.machinery import PathFinder
blocked = set(sys.argv[1].split(","))
class WithoutServer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutServer
sys.argv = ["longspan", *sys.argv[2:]]
from loadtest.cli.__main__ import main
main()
"""
SERVER_ONLY = ("torch", "transformers", "accelerate", "gguf", "pydantic_settings", "msgspec", "psutil")
SERVER_ONLY += ("prometheus_client", "safetensors", "sentencepiece", "tiktoken", "wonderwords")
LOAD = ("numpy", "httpx2", "uvloop", "jinja2", "markupsafe", "tokenizers")


def run_without_server(
    *arguments: str, blocked: tuple[str, ...] = SERVER_ONLY + LOAD
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _PREFIX, ",".join(blocked), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_client_commands_need_no_server_extra(server: Running) -> None:
    port = ["--port", str(server.port)]
    assert run_without_server("--help").returncode == 0
    assert run_without_server("generate", "--help").returncode == 0
    assert run_without_server("generate", "abc", *port).stdout == "cba"
    assert run_without_server("health", *port).returncode == 0
    assert run_without_server("read", __file__, *port).returncode == 0


def test_a_load_is_put_on_a_server_without_the_server_extra(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abcdef", "output_tokens": 6}\n')
    load = ["load", "--port", str(server.port), "--no-metrics", "--workload", str(file), "--requests", "4"]
    done = run_without_server(*load, "--concurrency", "2")
    assert "2 users" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    for more, sentence in (
        (["--repeats", "2"], "intervals across --repeats need numpy; run: pip install 'longspan[load]'"),
        (["--endpoint", "http://a/v1", "--endpoint-model", "m"], "--endpoint needs httpx2"),
    ):
        refused = run_without_server(*load, *more)
        assert refused.returncode == 1
        assert sentence in refused.stderr


def test_only_the_load_extra_is_needed_for_a_load(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abcdef", "output_tokens": 6}\n')
    files = {name: tmp_path / f"load.{name}" for name in ("json", "csv", "html", "svg")}
    load = ["load", "--port", str(server.port), "--no-metrics", "--workload", str(file), "--requests", "4"]
    load += ["--concurrency", "2", "--repeats", "2"]
    done = run_without_server(
        *load,
        *(word for name, path in files.items() for word in (f"--{name}", str(path))),
        blocked=SERVER_ONLY,
    )
    assert len(json.loads(files["json"].read_text())["runs"]) >= 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(path.stat().st_size for path in files.values())


@pytest.mark.parametrize(
    "command", [["serve"], ["serve", "--help"], ["models", "list"], ["models", "pull"], ["backends"]]
)
def test_server_commands_say_what_to_install(command: list[str]) -> None:
    done = run_without_server(*command)
    assert done.returncode == 1
    assert "pip install 'longspan[server]'" in done.stderr
    assert "Traceback" not in done.stderr


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


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["generate", "hi"], ["health"]])
def test_client_commands_are_fast(command: list[str], needed: float) -> None:
    arguments = command if command[0].startswith("-") else [*command, "--port", "1"]
    # A call takes twice as long; torch alone would take ten times.
    assert any(cpu_seconds(LONGSPAN, *arguments) < 5 * needed for _ in range(2))
