"""A digest of a file's beginning and of blocks all over it: milliseconds, where all of it takes seconds.

It tells files of models apart, whose weights all differ where one was trained further. It finds no change
that falls between two blocks: whoever wants to deceive it can. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_BEGINNING = 1 << 20  # where formats keep their headers
_BLOCK = 1 << 12
_BLOCKS = 1024


def sampled_digest(path: Path) -> str:
    """A hash of the file's size, its first MiB, and 1024 blocks of 4 KiB at equal distances, the last one at
    its end. Smaller files are hashed whole.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size}\n".encode())
        if size <= _BEGINNING + _BLOCKS * _BLOCK:
            digest.update(file.read())
        else:
            digest.update(os.pread(file.fileno(), _BEGINNING, 0))
            last = size - _BLOCK
            for number in range(1, _BLOCKS + 1):
                digest.update(os.pread(file.fileno(), _BLOCK, last * number // _BLOCKS))
    return digest.hexdigest()
