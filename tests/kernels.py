"""Compiled kernels for tests that have a cache folder of their own."""

from __future__ import annotations

import contextlib
from pathlib import Path

from server.settings import Settings


def share_kernels(cache: Path) -> Path:
    """Gives a cache folder the kernels that other tests have compiled, which takes many seconds."""
    kernels = Settings().cache_dir / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process of the tests was here before
        (cache / "kernels").symlink_to(kernels)
    return cache
