"""The SMG gateway before two servers: by their events it knows which of them has a prompt's pages."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.e2e.server import Server
from tests.e2e.test_openai import free_port

pytestmark = pytest.mark.stress


@contextmanager
def gateway(servers: list[Server]) -> Iterator[tuple[openai.OpenAI, Path]]:
    """A client of it, and its log."""
    port = free_port()
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(port)),
                *("--worker-urls", *(f"grpc://{server.address}" for server in servers)),
                *("--policy", "cache_aware", "--prometheus-host", "127.0.0.1"),
                *("--prometheus-port", str(port + 1), "--log-level", "info"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            with openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
            ) as client:
                yield client, Path(log.name)
        finally:
            process.kill()
            process.wait()


def wait_for(log: Path, words: str, count: int) -> None:
    end = time.monotonic() + 60
    while log.read_text().count(words) < count:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def answered(server: Server) -> float:
    """How many of the gateway's requests it got."""
    labels = (
        'grpc_code="OK",grpc_method="Generate",'
        'grpc_service="vllm.grpc.engine.VllmEngine",grpc_type="server_stream"'
    )
    return server.metrics().get(f"longspan_grpc_server_handled_total{{{labels}}}", 0)


def test_prompts_go_where_their_pages_are(tiny_packed):
    rng = random.Random(1)
    options = (*tiny_packed, "--protocols", "vllm", "--kv-events", "grpc")
    servers = [Server(*options, wait=False) for _ in range(2)]
    try:
        for server in servers:
            server.wait_ready()
        with gateway(servers) as (asking, log):
            wait_for(log, "KV event stream connected", 2)
            prompts = []
            for server in servers:
                with server.client() as client:
                    (name,) = client.models()
                    for _ in range(6):
                        prompt = " ".join(rng.choice(["one", "two", "three", "four"]) for _ in range(200))
                        client.generate(prompt, max_tokens=1)  # unseen by the gateway
                        prompts.append((server, prompt))
            time.sleep(1)
            rng.shuffle(prompts)
            for server, prompt in prompts:
                before = answered(server)
                answer = asking.completions.create(model=name, prompt=prompt, max_tokens=1)
                assert answered(server) == before + 1, "it went to the other server"
                assert answer.usage.prompt_tokens > 100
            assert "does not implement" not in log.read_text()
    finally:
        for server in servers:
            server.stop()
