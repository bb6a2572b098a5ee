"""The hooks for commits are parts of ``make lint``, so that the two cannot disagree."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_every_hook_is_a_command_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    target = re.search(r"^lint:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.split(r"[&|;\n]", target[1].replace("$(BIN)", ".venv/bin"))
    # A hook gets the names of the files that changed; make names them all.
    commands = [command.strip().removesuffix(" $(NATIVE)") for command in commands]
    assert hooks
    assert [hook["entry"] for hook in hooks if hook["entry"] not in commands] == []
