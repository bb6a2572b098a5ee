"""Whether only this user can have written a library in a folder, as ssh asks of the files that it reads.

A library's code runs as soon as it is loaded. A user who can write the folder's parents can still put another
folder in its place; that folder and the files in it then belong to that user.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def private(folder: Path) -> str:
    """Makes a folder that only this user can write, or takes that right from others where it is this user's.

    Returns:
        Why what lies there can't be trusted, as part of a sentence; empty if it can.

    Raises:
        OSError: the folder can't be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid == os.geteuid() and state.st_mode & _OTHERS:
        folder.chmod(stat.S_IMODE(state.st_mode) & ~_OTHERS)
    return distrust(folder)


def distrust(path: Path) -> str:
    """Why others could have written a file or folder, as part of a sentence; empty if they could not.

    Raises:
        OSError: there is none.
    """
    state = path.stat()
    if state.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {state.st_uid}, and this process runs as user {os.geteuid()}"
    if state.st_mode & _OTHERS:
        return f"other users can write it (mode {stat.S_IMODE(state.st_mode):o})"
    return ""
