"""Keeps others from Ray's processes on this machine: Ray Serve's gRPC servers listen on all addresses.

They read pickles, as all of Ray does, and one is in each replica.
"""

from __future__ import annotations

import importlib
import os
import secrets
from typing import Any

import psutil

from server.access.granted import is_loopback

MESSAGE_BYTES = 64 << 20
"""Of the largest message that goes through Ray."""

# Read when Ray is imported: on Linux, too, it makes 127.0.0.1 the address of a node, which Ray else replaces.
_ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Variables that an operator may have set otherwise.
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    # Proxy and replica speak gRPC, and have one event loop each: half the processor time of a token.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Of requests, which the proxy reads whole, and of answers: 16 MiB of embeddings and more.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MESSAGE_BYTES),
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(MESSAGE_BYTES),
}

HOOK = "server.ray.loopback.hold"
"""Ray calls it in each of its processes of Python, before anything else (``worker_process_setup_hook``)."""

_HOST, _PORT = "RAY_LONGSPAN_HOST", "RAY_LONGSPAN_PORT"
_ALL = ("[::]:", "0.0.0.0:")


def before_ray() -> None:
    """To be called before Ray is imported, in the process that starts it.

    Ray's processes then ask one another for a token that only this run has, and that is in no file.
    """
    os.environ.update(_ONE_MACHINE)
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def environment(host: str, port: int) -> dict[str, str]:
    """Variables that tell the hook the address of the proxy; every other gRPC server is on 127.0.0.1."""
    return {_HOST: host, _PORT: str(port)}


def has_one_application() -> bool:
    """Whether this process is of a Ray that ``longspan serve --ray`` has started, where no other one runs."""
    return _PORT in os.environ


def hold() -> None:
    """From now on this process's servers of ``grpc.aio`` that would listen on all addresses listen on one."""
    host, port = os.environ[_HOST], os.environ[_PORT]
    of_proxy = f"[{host}]" if ":" in host else host
    concrete: Any = importlib.import_module("grpc.aio._server").Server  # from which Ray derives its own
    bind = concrete.add_insecure_port

    def add_insecure_port(self: Any, address: str) -> int:
        if address.startswith(_ALL):
            asked = address.rpartition(":")[2]
            address = f"{of_proxy if asked == port else '127.0.0.1'}:{asked}"
        return bind(self, address)

    concrete.add_insecure_port = add_insecure_port


def exposed(host: str, pid: int | None = None) -> list[str]:
    """Addresses of a process and its descendants that other machines reach, as ``HOST:PORT``.

    Args:
        host: one that is meant to be reached.
        pid: of the process; this one without it.
    """
    found = []
    first = psutil.Process(pid)
    for process in (first, *first.children(recursive=True)):
        try:
            name, connections = process.name(), process.net_connections("inet")
        except psutil.Error:  # it has ended
            continue
        for connection in connections:
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and address.ip != host and not is_loopback(address.ip):
                found.append(f"{address.ip}:{address.port} ({name})")
    return found
