"""The command line against the real server."""

import os
import pty
import signal
import subprocess
import sys

from server.ready_lines import EXAMPLE
from tests.command import longspan


def run(server, name, *arguments):
    return longspan(name, "--port", str(server.port), *arguments)


def test_generate_answers_a_question(server):
    result = run(server, "generate", EXAMPLE, "--chat", "--stats")
    assert result.returncode == 0
    assert "Tokyo" in result.stdout
    assert "tokens/s" in result.stderr


def test_generate_streams_to_a_terminal_and_ctrl_c_cancels_on_the_server(server):
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "loadtest.cli", "generate", "--port", str(server.port)),
            *("Count to a million: 1, 2, 3,", "--max-tokens", "4000"),
        ],
        stdout=end,
        stderr=subprocess.PIPE,
    )
    os.close(end)
    pieces = [os.read(terminal, 1000) for _ in range(3)]
    assert all(pieces)
    with server.client() as client:
        assert client.server_info().load.running == 1
    process.send_signal(signal.SIGINT)
    server.wait_idle()
    assert process.wait(60) == 130
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    os.close(terminal)


def test_errors_name_the_field_at_fault(server):
    result = run(server, "generate", "hello", "--temperature", "-1")
    assert result.returncode == 1
    assert "temperature" in result.stderr
    assert "Traceback" not in result.stderr


def test_health_tells_by_its_exit_code(server):
    assert run(server, "health").returncode == 0
    without_server = longspan("health", "--port", "1", "--timeout", "2")
    assert without_server.returncode == 1
    assert without_server.stderr


def test_models_list_shows_the_default_model(default_model):
    result = longspan("models", "list")
    assert result.returncode == 0
    assert "smollm2-135m-instruct" in result.stdout
