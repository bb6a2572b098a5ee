"""kvpress as an oracle of what attention variants do to a model: it shares no code with this project.

A package of Nvidia's with methods that throw keys and values away, on top of transformers. It wants another
version of transformers than this project, so it gets an environment of its own in the cache folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.tasks.types import Sample
from server.models.cache import make_once
from server.settings import Settings

REQUIREMENT = "kvpress==0.5.5"
# First and exactly, since an open range would bring a GPU's packages. Nothing later may change it.
TORCH = "torch==2.13.0"
_PROGRAM = Path(__file__).with_name("kvpress_program.py")


def installed() -> Path:
    """The Python of an environment with the package, which is made once per machine.

    Raises:
        subprocess.CalledProcessError: pip cannot; it says why.
    """

    def install(folder: Path) -> None:
        # Not every Python brings ensurepip, so the new environment gets its packages from this one's pip.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
        # fire, which kvpress asks for and does not use here, has no wheel of a version that it takes.
        pip += ["--disable-pip-version-check", "--only-binary", ":all:", "--no-binary", "fire"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, REQUIREMENT, "transformers<5.3"], check=True)

    folder = Settings().cache_dir / "tools" / REQUIREMENT.replace("==", "-")
    return make_once(folder, install, lambda stage, fraction: None) / "bin" / "python"


def run(model: Path, method: str, keys: int, samples: Iterable[Sample], folder: Path) -> list[dict[str, Any]]:
    """What kvpress makes of a task file.

    Args:
        model: its folder.
        method: of the program's; see there for what it does and gives.
        keys: that the last token of a prompt sees.
        samples: of the task file.
        folder: where the task file and the results go.

    Raises:
        RuntimeError: it fails; the message ends with what it said last.
    """
    file, results = folder / f"{method}.jsonl", folder / f"{method}-results.jsonl"
    file.write_text("\n".join(json.dumps(asdict(sample)) for sample in samples), encoding="utf-8")
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [str(installed()), str(_PROGRAM), str(model), method, str(keys), str(file), str(results)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **quiet})
    if done.returncode:
        raise RuntimeError(f"kvpress fails at {method}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
