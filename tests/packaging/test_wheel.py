"""The wheel holds all that it must, and works where nothing of this folder can be seen."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from attention.kernels.cpu import compiling, levels, native
from loadtest.compare import document
from tests.loadtest.synthetic import Sizes, draw

ROOT = Path(__file__).parents[2]
PACKAGES = ("attention", "server", "loadtest", "longspan")


# Compiling every level takes a minute and more, where nothing is kept.
pytestmark = [pytest.mark.timeout(900), pytest.mark.long]


def build(folder: Path, target: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    everything = os.environ | environment
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=everything)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Code that other tests have compiled is reused.
    build(folder, "wheel", LONGSPAN_CACHE_DIR=str(native.kept().parent))
    (built,) = folder.glob("longspan-*.whl")
    return built


def libraries() -> set[str]:
    """The compiled files that the wheel must carry."""
    sources = [path for package in PACKAGES[:2] for path in (ROOT / package).rglob("*.cpp")]
    assert len(sources) >= 4
    carried = {
        compiling.packaged(source, level.name, level.arguments)
        for source in sources
        for level in levels.of_machine()
    }
    return {str(path.relative_to(ROOT)) for path in carried}


def test_an_editable_install_and_a_wheel_built_without_a_compiler_carry_only_sources(tmp_path: Path) -> None:
    build(tmp_path / "editable", "wheel:editable", CXX="false")
    for compiler, said in (
        ("no-such-compiler", "CXX names no-such-compiler"),
        ("false", "false compiles for no"),
    ):
        done = build(tmp_path / compiler, "wheel:standard", CXX=compiler)
        assert "carries no compiled code" in done.stderr
        assert said in done.stderr
    made = list(tmp_path.glob("*/*.whl"))
    assert len(made) == 3
    for path in made:
        assert path.name.endswith("-py3-none-any.whl")
        assert not any(name.endswith(".so") for name in zipfile.ZipFile(path).namelist())


def test_the_wheel_has_every_source_file_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".so")} == libraries()
    names -= libraries()
    sources = set()
    for package in PACKAGES:
        parent = ROOT / "proto" if package == "longspan" else ROOT
        files = (path for path in (parent / package).rglob("*") if path.is_file())
        sources |= {str(path.relative_to(parent)) for path in files if "__pycache__" not in path.parts}
    assert names == sources
    assert {"longspan/py.typed", "longspan/v1/inference.proto", "longspan/v1/inference_pb2.pyi"} <= names
    dist_info = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    assert {"LICENSE", "entry_points.txt", "METADATA"} <= dist_info


def test_pip_refuses_a_python_that_is_not_tested(wheel: Path) -> None:
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    said = zipfile.ZipFile(wheel).read(metadata).decode().split("\n\n")[0]
    (needed,) = (line.partition(": ")[2] for line in said.splitlines() if line.startswith("Requires-Python"))
    allowed = SpecifierSet(needed)
    assert [minor for minor in range(8, 20) if f"3.{minor}" in allowed] == [11, 12]
    found = (ROOT / "Makefile").read_text()
    assert "in ((3, 11), (3, 12))" in found, "make install looks for the same"


def test_the_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    install.append("--no-compile")  # what is imported is compiled then
    subprocess.run([*install, "--no-index", str(wheel)], check=True, timeout=60)
    # Its dependencies come from this environment, by a path entry: so .pth files there, this folder's own
    # among them, are not read.
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    dependencies = subprocess.run(
        [sys.executable, "-c", query], check=True, capture_output=True, text=True
    ).stdout.strip()
    Path(site, "dependencies.pth").write_text(dependencies)

    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=outside)
        assert done.returncode == 0, done.stderr
        return done.stdout

    longspan = environment / "bin" / "longspan"
    assert "--kv-memory" in run(longspan, "serve", "--help")
    assert run(longspan, "--version").strip() in wheel.name
    program = """
import longspan, server
from loadtest.compare.schema import FILE
from loadtest.tasks.words import *
print(longspan.__file__, server.__file__, FILE)
"""
    for path in run(python, "-c", program).split():
        assert path.startswith(site)
        assert Path(path).exists()

    # Native code at every level that this processor has, where there is no compiler.
    program = """
import sys
from attention.kernels.cpu import calls, levels, native, select
from server.models.quantized import native as quantized
for level in sys.argv[1:]:
    levels._InForce.loaded = False
    levels.use(level)
    for compiled in calls.compiled, select.compiled, quantized._compiled:
        compiled.cache_clear()
        compiled()
    print(level, native.origin(calls.SOURCE))
"""
    outside |= {"PATH": "/nowhere", "LONGSPAN_CACHE_DIR": str(tmp_path / "cache")}
    executable = [level.name for level in levels.executable()]
    assert run(python, "-c", program, *executable).splitlines() == [
        f"{level} as the package carries it" for level in executable
    ]
    assert not (tmp_path / "cache").exists()

    document.save(draw(1, Sizes(contexts=2, lengths=(4096,))), tmp_path / "c.json")
    shown = run(longspan, "compare", "--show", "c.json", "--html", "c.html", "--csv", "csv")
    assert "4k, 1 user, cached prompts" in shown
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2  # the templates, with style, script and document in them
    assert "quality-speed" in page
    made = {path.name for path in tmp_path.iterdir()} - {environment.name, "c.json"}
    assert made == {"c.html", "csv"}, "nothing else is written where a command runs"
    assert "niah_single_1" in run(longspan, "compare", "--task", "help")
