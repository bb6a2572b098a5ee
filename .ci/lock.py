"""Writes requirements.lock: what the image installs beside torch, pinned with the hashes of its files."""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """\
# What the image installs beside torch, with the hashes of its files; written by make lock. For
#     pip install --require-hashes --no-deps -r requirements.lock
# torch has other files, and so other hashes, on PyTorch's indexes than on PyPI.
"""
QUIET = ("--strip-extras", "--no-header", "--no-annotate", "--no-emit-options", "--allow-unsafe", "--quiet")

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
with tempfile.TemporaryDirectory() as folder:
    wanted, locked = Path(folder, "requirements.in"), Path(folder, "requirements.lock")
    lines = (f"-c {ROOT}/constraints.txt", *project["dependencies"], *extras["server"], *extras["otel"])
    wanted.write_text("\n".join(lines))
    compile_them = [sys.argv[1], "--generate-hashes", *QUIET, "--output-file", str(locked), str(wanted)]
    subprocess.run(compile_them, check=True)
    entries = re.split(r"\n(?=\w)", locked.read_text().strip())
kept = [entry for entry in entries if not entry.startswith("torch==")]
(ROOT / "requirements.lock").write_text(HEAD + "\n".join(kept) + "\n")
