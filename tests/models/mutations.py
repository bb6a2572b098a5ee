"""Random changes of a checkpoint's files, each from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.models.changes import WEIGHTS, put

_NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 0.0, 0.5, -2.5, 65536, 2**31 - 1, 2**32, 2**63, 10**30),
    *(1e300, 1e-300, float("nan"), float("inf"), "", "x", "\ud800", "../x", "9" * 50, [], {}, [[]], [1, 2]),
    *({"a": 1}, ["x"] * 50, [None]),
]
_NASTY_BYTES = [b"\x00", b"\xff", b"[", b"{", b'"', b"9", b"-", b",", b"\xff" * 8, b"[" * 3000]


def mutate(folder: Path, name: str, seed: int) -> None:
    """Changes one file in one to three places.

    Args:
        folder: the checkpoint, of which the file may be linked elsewhere.
        name: the file; of weights mostly the header is changed.
        seed: the same one gives the same changes.
    """
    rng = random.Random(f"{name} {seed}")
    content = (folder / name).read_bytes()
    for _ in range(rng.randint(1, 3)):
        content = _change(content, rng, name)
    put(folder / name, content)


def _change(content: bytes, rng: random.Random, name: str) -> bytes:
    if rng.random() < 0.3:
        return _bytes(content, rng)
    if name != WEIGHTS:
        return _json(content, rng)
    length = int.from_bytes(content[:8], "little")
    said = _json(content[8 : 8 + length], rng)
    return len(said).to_bytes(8, "little") + said + content[8 + length :]


def _bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(min(len(content), 5000)) if content else 0
    match rng.randrange(4):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + rng.choice(_NASTY_BYTES) + content[at:]
        case 2:
            return content[:at] + rng.choice(_NASTY_BYTES) + content[at + 1 :]
        case _:
            return content[:at] + content[at + rng.randint(1, 40) :]


def _json(content: bytes, rng: random.Random) -> bytes:
    """A value somewhere in it is replaced, removed, or put there."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):  # an earlier change broke it
        return _bytes(content, rng)
    part = whole
    while isinstance(part, dict | list) and part:
        key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
        if isinstance(part[key], dict | list) and part[key] and rng.random() < 0.7:
            part = part[key]
            continue
        if rng.random() < 0.2:
            del part[key]
        else:
            part[key] = rng.choice(_NASTY)
        break
    return json.dumps(whole).encode()
