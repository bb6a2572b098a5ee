"""Which package may know which: read from the sources, lazy imports included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ("measuring", "tasks")
"""What measures and what is asked: they serve all commands and know none."""


def imports(path):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "loadtest":
                yield from (f"loadtest.{name.name}" for name in node.names)


def known(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    return {(name, path.relative_to(ROOT)) for path in files for name in imports(path)}


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_load_test_knows_the_server_by_its_api_alone():
    wrong = [
        (str(path), name)
        for name, path in known("loadtest")
        if within(name, "server", "attention") and path.parts[:2] != ("loadtest", "direct")
    ]
    assert not wrong


def test_attention_knows_nothing_of_server_and_load_test():
    assert not [pair for pair in known("attention") if within(pair[0], "server", "loadtest")]


@pytest.mark.parametrize("package", CORE)
def test_the_core_knows_none_of_the_commands(package):
    others = [each.name for each in (ROOT / "loadtest").iterdir() if (each / "__init__.py").exists()]
    commands = [f"loadtest.{name}" for name in others if name not in CORE]
    assert "loadtest.load" in commands
    assert not [pair for pair in known(f"loadtest/{package}") if within(pair[0], *commands)]
