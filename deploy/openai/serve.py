"""``make serve-openai``: ``longspan serve``, and in front of it the SMG gateway with OpenAI's HTTP API.

Arguments are those of ``longspan serve``, and ``--gateway-port`` (30000). Both listen on this machine only.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

_READY = re.compile(r"Longspan is ready: (\S+) on \S+:(\d+)$")
# The gateway fetches the tokenizer after it has begun to listen.
_GATEWAY_SECONDS = 60.0
_LOOK_SECONDS = 0.2
_HERE = "127.0.0.1"
_LAST_PORT = 65535


def main() -> int:
    """Serves until a signal, or until one of the two processes ends, and then ends the other one."""
    parser = argparse.ArgumentParser(prog="make serve-openai", allow_abbrev=False)
    parser.add_argument("--gateway-port", type=int, default=30000)
    arguments, others = parser.parse_known_args()
    if refusal := _refusal(arguments.gateway_port):
        parser.error(refusal)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # With the end of this program, however it comes, its end of the pipe closes, and the server ends.
    longspan = [sys.executable, "-m", "server.cli", "serve", "--protocols", "vllm", "--end-with-stdin"]
    server = subprocess.Popen(
        [*longspan, *others], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    gateway = None
    try:
        assert server.stdout is not None
        if (found := _until_ready(server.stdout)) is None:
            return server.wait()
        model, port = found
        threading.Thread(target=sys.stdout.writelines, args=(server.stdout,), daemon=True).start()
        gateway = subprocess.Popen(_command(arguments.gateway_port, port), process_group=0)
        url = f"http://{_HERE}:{arguments.gateway_port}/v1/chat/completions"
        ask = {"model": model, "messages": [{"role": "user", "content": "What is the capital of Japan?"}]}
        if _answers(url, {**ask, "max_tokens": 1}, gateway):
            print(f"OpenAI's API answers on http://{_HERE}:{arguments.gateway_port}/v1", flush=True)
            print(f"  try: curl {url} -H 'content-type: application/json' -d '{json.dumps(ask)}'", flush=True)
            while server.poll() is None and gateway.poll() is None:
                time.sleep(_LOOK_SECONDS)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        if gateway is not None:
            gateway.kill()  # it has nothing to save, and else waits five seconds for balancers
            gateway.wait()
        server.terminate()
        server.wait()


def _refusal(port: int) -> str:
    """Why the gateway can't have a port, before minutes pass or another program there answers for it."""
    if not 0 < port < _LAST_PORT:
        return f"--gateway-port: is {port}; it must be from 1 to {_LAST_PORT - 1}"
    for wanted in (port, port + 1):
        with socket.socket() as probe:
            # As servers do: connections that wait for their end don't keep a port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HERE, wanted))
                probe.listen()
            except OSError as error:
                return (
                    f"port {wanted} of {_HERE} can't be had ({error.strerror}); choose another "
                    "--gateway-port, with the next one free, too, for the gateway's metrics"
                )
    return ""


def _until_ready(lines: Iterable[str]) -> tuple[str, int] | None:
    """The model's name and gRPC's port; ``None`` where the server ends before it is ready."""
    for line in lines:
        print(line, end="", flush=True)
        if match := _READY.search(line):
            return match[1], int(match[2])
    return None


def _command(port: int, grpc_port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "smg", "launch", "--host", _HERE, "--port", str(port)),
        *("--worker-urls", f"grpc://{_HERE}:{grpc_port}", "--policy", "round_robin"),
        *("--prometheus-host", _HERE, "--prometheus-port", str(port + 1), "--log-level", "error"),
    ]


def _answers(url: str, body: dict[str, Any], gateway: subprocess.Popen[bytes]) -> bool:
    """Whether the gateway comes to answer a request, of whatever model."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    end = time.monotonic() + _GATEWAY_SECONDS
    while time.monotonic() < end and gateway.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=_GATEWAY_SECONDS):
                return True
        except urllib.error.HTTPError as error:
            # No worker yet, or none with a tokenizer. Encoders are there, and refuse chats.
            if error.code not in (404, 503):
                return True
        except OSError:  # it does not listen yet
            pass
        time.sleep(_LOOK_SECONDS)
    print(
        "the gateway does not answer; it can't reach a server with --identities or TLS (docs/protocols.md)",
        file=sys.stderr,
    )
    return False


if __name__ == "__main__":
    sys.exit(main())
