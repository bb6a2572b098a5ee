"""Which processes of this machine listen on a port."""

from __future__ import annotations

from pathlib import Path

_LISTENS = "0A"
_PROC = Path("/proc")


def processes_on(port: int) -> tuple[int, ...]:
    """Processes that listen on a TCP port of this machine; none where the system or the user's rights don't
    show them.
    """
    sockets = _sockets(port)
    if not sockets:
        return ()
    found = []
    for folder in _PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if any(_link(entry) in sockets for entry in (folder / "fd").iterdir()):
                found.append(int(folder.name))
        except OSError:  # another user's, or ended
            continue
    return tuple(sorted(found))


def _sockets(port: int) -> set[str]:
    """Names of the sockets that listen there in ``/proc``."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def _link(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:
        return ""
