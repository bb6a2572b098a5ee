"""The example in Node, from the proto to an answer, with what npm installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.stress
@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_the_node_example_streams_an_answer(server, tmp_path):
    folder = tmp_path / "examples" / "node"
    shutil.copytree(ROOT / "examples/node", folder, ignore=shutil.ignore_patterns("node_modules", "gen"))
    (tmp_path / "proto").symlink_to(ROOT / "proto")

    def run(*command, **environment):
        return subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
        )

    installed = run("npm", "install", "--no-audit", "--no-fund")
    assert installed.returncode == 0, installed.stderr
    generated = run("npm", "run", "generate")
    assert generated.returncode == 0, generated.stderr
    url = f"http://{server.host}:{server.port}"
    answered = run("node", "chat.mjs", "What is the capital of Japan?", LONGSPAN_URL=url)
    assert answered.stderr == ""
    assert "Tokyo" in answered.stdout
    assert answered.stdout.splitlines()[-1].endswith(" tokens")
    refused = run("node", "chat.mjs", LONGSPAN_URL="http://127.0.0.1:1")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Unavailable: ")
