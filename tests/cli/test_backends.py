"""``longspan backends``: the table for a model, in a terminal, in a pipe and for machines."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attention import BACKENDS
from attention.kernels.cpu import calls, levels, native
from attention.registry import imported
from server.cli.application import application
from tests.command import longspan
from tests.models_zoo import save_tiny
from tests.packages import install


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but those that a test gives."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LONGSPAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LONGSPAN_CACHE_DIR", "")  # the command sets it; undone afterwards
    monkeypatch.delenv("LONGSPAN_CACHE_DIR")


# No processor executes every level.
BEYOND = next(level.name for level in levels.LEVELS if level not in levels.executable())


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with soft-caps and, in one of its two layers, a window."""
    return save_tiny("gemma2", tmp_path_factory.mktemp("models") / "gemma2")


def run(*arguments: str | Path) -> Any:
    """The command in this process, which has imported torch already; its output is no terminal."""
    return CliRunner().invoke(application, ["backends", *map(str, arguments)])


def rows(table: str) -> list[list[str]]:
    """Cells of a table in a pipe, which stand at least three spaces apart."""
    return [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in table.splitlines()]


def _native() -> str:
    names = [level.name for level in levels.executable()]
    origin = native.origin(calls.SOURCE)
    return f"native code is of level {names[-1]}, {origin}; this processor executes {', '.join(names)}"


def test_the_table_of_a_model_in_a_pipe(gemma: Path) -> None:
    done = longspan("backends", "--model", str(gemma))
    assert (done.returncode, done.stderr) == (0, "")
    head, works, refused = done.stdout.split("\n\n")
    assert head == (
        "gemma2: layer 0: 4 query heads over 2 KV heads of size 16, window 8, soft-cap 50; "
        "layer 1: 4 query heads over 2 KV heads of size 16, soft-cap 50; on cpu, float32, KV cache float32, "
        f"page size 16\nIts task: generate. Speculation: --speculate ngram, self, draft\n{_native()}"
    )
    patterns = imported(BACKENDS["sparse"].family)
    title, *shown = [row[0] for row in rows(works)]
    assert title == "Backend"
    assert sorted(shown) == sorted([*BACKENDS, *["sparse"] * (len(patterns) - 1)])
    for pattern in patterns:
        assert f"pattern={pattern} " in works
    assert "window=1020 sinks=4" in works
    assert any("sdpa lacks soft-capping (layers 0-1)" in row for row in rows(refused))


def test_the_table_folds_where_there_are_100_columns(gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cli.backends.UNBROKEN", 100)
    done = run("--model", gemma)
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "…" not in done.stdout
    folded = " ".join(done.stdout.split())
    for word in ("sliding_window", "random_blocks=3", "soft-capping", "reference"):
        assert word in folded


def test_json_says_all_of_it_and_options_are_judged(gemma: Path) -> None:
    options = ["--attention-option", "window=9", "--page-size", "8", "--kv-dtype", "float8_e4m3"]
    done = run("--model", gemma, "--json", *options)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["model"], document["device"]) == ("gemma2", "cpu")
    assert (document["tasks"], document["speculate"]) == (["generate"], ["ngram", "self", "draft"])
    assert (document["dtype"], document["kv_dtype"], document["page_size"]) == ("float32", "float8_e4m3", 8)
    by_name = {(entry["backend"], entry["options"].get("pattern")): entry for entry in document["backends"]}
    assert by_name["full", None]["refusal"] == "full attention takes no options; remove window"
    window = by_name["sliding_window", None]
    assert window["options"]["window"] == "9"
    assert window["refusal"] is None
    kernels = {entry["kernel"]: entry for entry in window["kernels"]}
    assert kernels["reference"] == {"kernel": "reference", "works": True, "reasons": [], "products": None}
    assert kernels["sdpa"]["works"] is False
    assert "sdpa lacks soft-capping (layers 0-1)" in kernels["sdpa"]["reasons"]
    assert kernels[window["auto"]]["works"]
    if window["auto"] == "cpu_paged" and platform.machine() == "x86_64":
        assert kernels["cpu_paged"]["products"] in ("16-bit integers", "bfloat16")
    assert by_name["sparse", "longformer"]["options"]["window"] == "9"


def test_only_one_backend_even_if_it_is_broken(
    gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "without-it", {"longspan.backends": {"lost": "without_it:GONE"}}, "")
    monkeypatch.syspath_prepend(tmp_path)
    done = run("--model", gemma, "--attention", "lost")
    assert done.exit_code == 0, done.stderr
    assert "lost (without-it 1.0)" in done.stdout
    assert "nothing" in done.stdout
    assert "backend lost of without-it 1.0 cannot be loaded: AttributeError" in done.stdout
    assert "sliding_window" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--attention", "ful"], 1, "there is no attention backend 'ful'; choose full or "),
        (["--model", "/no/such"], 1, "there is no model '/no/such'"),
        (["--model", "/no/such", "--native-level", BEYOND], 2, "--native-level: "),
        (["--page-size", "0"], 2, "--page-size: should be greater than or equal to 1"),
        (["--attention-option", "window"], 2, "--attention-option: 'window' is not of the form KEY=VALUE"),
    ],
)
def test_mistakes_are_sentences(gemma: Path, arguments: list[str], code: int, sentence: str) -> None:
    model = [] if "--model" in arguments else ["--model", str(gemma)]
    done = run(*model, *arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith(f"longspan: {sentence}")
    assert "Traceback" not in done.stderr
