"""The hooks for commits are parts of ``make lint``, so that the two cannot disagree."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_every_hook_is_a_line_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    target = re.search(r"^lint:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = re.split(r"\s*[&;\n]+\s*", target[1].replace("$(BIN)", ".venv/bin"))
    # A hook gets the names of the files that changed; make names them all.
    lines = [line.removesuffix(" $(NATIVE)") for line in lines]
    assert hooks
    assert [hook["entry"] for hook in hooks if hook["entry"] not in lines] == []
