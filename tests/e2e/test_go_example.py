"""The example in Go, from the proto to an answer: with Debian's packages, or with modules that Go fetches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan import Client
from tests.e2e.envoy import make_access
from tests.e2e.server import Server

ROOT = Path(__file__).parents[2]
DEBIAN = Path("/usr/share/gocode")
PLUGINS = {
    "protoc-gen-go": "google.golang.org/protobuf/cmd/protoc-gen-go",
    "protoc-gen-go-grpc": "google.golang.org/grpc/cmd/protoc-gen-go-grpc",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


# Debian has two versions of a package; with the older one the stubs don't work.
NEEDED = "golang-google-grpc-dev, golang-github-golang-protobuf-1-5-dev and golang-google-genproto-dev"


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """The program."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if not shutil.which("go", path=path):
        pytest.skip("Go is not installed")
    gopath = tmp_path_factory.mktemp("go")
    folder = gopath / "src/example/chat"  # where GOPATH mode looks for it
    shutil.copytree(ROOT / "examples/go", folder, ignore=shutil.ignore_patterns("gen", "go.sum"))
    (folder.parents[1] / "proto").symlink_to(ROOT / "proto")
    environment = {
        **os.environ,
        "PATH": f"{gopath}/bin:{path}",
        "GOBIN": f"{gopath}/bin",
        "GOFLAGS": "-mod=mod",
    }

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment
        )

    for plugin, source in PLUGINS.items():
        if not shutil.which(plugin, path=environment["PATH"]):
            _had(run("go", "install", f"{source}@latest"), plugin)
    generated = run("buf", "generate")
    assert generated.returncode == 0, generated.stderr
    grpc = DEBIAN / "src/google.golang.org/grpc/clientconn.go"
    if grpc.exists():
        if not (DEBIAN / "src/github.com/golang/protobuf/proto/proto.go").exists():
            pytest.skip(f"of Debian's packages it takes {NEEDED}")
        environment |= {"GO111MODULE": "off", "GOPATH": f"{gopath}:{DEBIAN}", "GOFLAGS": ""}
        if "func NewClient(" not in grpc.read_text():  # before grpc 1.63 under its old name
            program = folder / "chat.go"
            program.write_text(program.read_text().replace("grpc.NewClient(", "grpc.Dial("))
    else:
        _had(run("go", "mod", "tidy"), "the modules")
    built = run("go", "build", "-o", "chat", ".")
    assert built.returncode == 0, built.stderr
    return folder / "chat"


def _had(run: subprocess.CompletedProcess[str], what: str) -> None:
    if run.returncode:
        pytest.skip(f"Go can't fetch {what}: {run.stderr.strip().splitlines()[-1]}")


def asking(chat: Path, port: int, **environment: str | Path) -> subprocess.Popen[str]:
    """The program, started."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("LONGSPAN_")}
    own |= {"LONGSPAN_PORT": str(port)} | {name: str(value) for name, value in environment.items()}
    command = [chat, "What is the capital of Japan?"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)


@pytest.mark.stress  # Go compiles gRPC
def test_an_answer_is_streamed(chat, server):
    out, error = asking(chat, server.port).communicate(timeout=60)
    assert error == ""
    assert re.fullmatch(r"The capital of Japan is Tokyo\.\n\d+ tokens\n", out)


@pytest.mark.stress
def test_what_fails_is_told(chat):
    process = asking(chat, 1)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert error.startswith("Unavailable: ")


@pytest.mark.stress
def test_tls_a_token_and_a_second_attempt_when_the_server_says(chat, tiny_packed, tmp_path):
    access = make_access(tmp_path)
    with (access.folder / "identities.toml").open("a") as file:
        file.write("tokens_per_minute = 60\n")
    with Server(*tiny_packed, *access.serve) as server:
        tls = {"LONGSPAN_CA": access.folder / "ca.crt"}
        out, error = asking(chat, server.port, **tls).communicate(timeout=60)
        assert out == ""
        assert re.match("Unauthenticated: .*no token", error)
        with Client(port=server.port, **access.connect) as client:
            client.generate("one two", max_tokens=64, ignore_eos=True)  # some 8 seconds' allowance too much
        process = asking(chat, server.port, **tls, LONGSPAN_TOKEN=access.token)
        out, error = process.communicate(timeout=60)
    assert re.fullmatch(r".*has used its 60 tokens per minute.*; asking again in \d\.\d+s\n", error)
    assert process.returncode == 0
    assert out.endswith(" tokens\n")
