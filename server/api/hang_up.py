"""Ends the connections that gRPC has on a port; its own API can't, but by ending calls with CANCELLED."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

# Those accepted while others end are found the next time.
_TIMES = 5
# A program of socket filters, see socket(7), of one instruction: keep 0 bytes of what comes.
_ATTACH_FILTER, _RETURN = 26, 0x06
_DROP = struct.pack("HBBI", _RETURN, 0, 0, 0)


def hang_up(port: int) -> None:
    """Ends this process's connections on a port, and lets it accept no more until it listens there anew.

    Clients get UNAVAILABLE and may call again: a server of gRPC that stops ends what it has not looked at yet
    with CANCELLED, which no client repeats. Clients that connect meanwhile try again after a second.

    Args:
        port: that the process listens on.
    """
    program = ctypes.create_string_buffer(_DROP)
    for listening in _sockets(port, psutil.CONN_LISTEN):
        attached = struct.pack("HL", 1, ctypes.addressof(program))
        with suppress(OSError):  # without it some connections may be back too early
            listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, attached)
    for _ in range(_TIMES):
        found = False
        for connection in _sockets(port, psutil.CONN_ESTABLISHED):
            found = True
            with suppress(OSError):  # it has ended meanwhile
                connection.shutdown(socket.SHUT_RDWR)
        if not found:
            break


def _sockets(port: int, status: str) -> Iterator[socket.socket]:
    """Sockets of this process, each for the time until the next is asked for."""
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == status and connection.laddr.port == port:
            with suppress(OSError), _also(connection.fd) as ours:
                if ours.getsockname()[1] == port:
                    yield ours


@contextmanager
def _also(descriptor: int) -> Iterator[socket.socket]:
    """The socket by a descriptor of its own: that of gRPC may be closed, and be another file, at any time."""
    with socket.socket(fileno=os.dup(descriptor)) as ours:
        yield ours
