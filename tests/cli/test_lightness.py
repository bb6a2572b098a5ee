"""Client commands start fast, and run where the server's dependencies are not installed."""

from __future__ import annotations

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
class WithoutServer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        blocked = {"torch", "transformers", "pydantic_settings", "msgspec", "numpy", "httpx2", "uvloop"}
        blocked |= {"jinja2", "markupsafe", "psutil", "tokenizers", "wonderwords"}
        return None if name.split(".")[0] in blocked else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutServer
sys.argv = ["longspan", *sys.argv[1:]]
from loadtest.cli.__main__ import main
main()
"""


def run_without_server(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PREFIX, *arguments], capture_output=True, text=True, timeout=60
    )


def test_client_commands_need_no_server_extra(server: Running) -> None:
    port = ["--port", str(server.port)]
    assert run_without_server("--help").returncode == 0
    assert run_without_server("generate", "--help").returncode == 0
    assert run_without_server("generate", "abc", *port).stdout == "cba"
    assert run_without_server("health", *port).returncode == 0


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


@pytest.mark.parametrize(
    "command", [["serve"], ["serve", "--help"], ["models", "list"], ["models", "pull"], ["backends"]]
)
def test_server_commands_say_what_to_install(command: list[str]) -> None:
    done = run_without_server(*command)
    assert done.returncode == 1
    assert "pip install 'longspan[server]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["generate", "hi"], ["health"]])
def test_client_commands_are_fast(command: list[str]) -> None:
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu_seconds()  # processor time: the machine may be busy with other things
    arguments = command if command[0].startswith("-") else [*command, "--port", "1"]
    subprocess.run([LONGSPAN, *arguments], capture_output=True, timeout=60)
    assert cpu_seconds() - before < 0.8
