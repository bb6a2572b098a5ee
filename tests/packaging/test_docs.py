"""Files, folders, headings, modules and tests that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "loadtest").glob("*.md")])
DECISIONS = ROOT / "docs" / "decisions"

_CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NAMED = re.compile(r"`((?:attention|deploy|docs|loadtest|proto|server|tests|\.ci)/[\w./-]*)`")
_MODULE = re.compile(r"python -m ((?:loadtest|server|tests|attention)[\w.]*)")
_TEST = re.compile(r"`(test_\w+)`(?: in `(tests/[\w./-]+)`)?")
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    return _CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    anchors: dict[str, int] = {}
    found = set()
    for title in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = anchors[anchor] = anchors.get(anchor, -1) + 1
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        known = file.is_relative_to(ROOT) and file.exists()
        if not known or (anchor and file.suffix == ".md" and anchor not in headings(file)):
            broken.append(target)
    return broken


def missing_names(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    named = [name for name in _NAMED.findall(prose(page)) if not (ROOT / name).exists()]
    for module in _MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            named.append(module)
    return named


def missing_tests(page: Path) -> list[str]:
    """Those that are in no file, or not in the one that is named with them."""
    named = _TEST.findall(prose(page))
    homes: dict[str, set[str]] = {}
    for file in (ROOT / "tests").rglob("test_*.py") if named else ():
        for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8")):
            homes.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    return [name for name, file in named if name not in homes or (file and file not in homes[name])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_a_page_exist(page):
    assert not broken_links(page)
    # The changelog names what there was.
    assert page.name == "CHANGELOG.md" or not (missing_names(page) or missing_tests(page))


def test_missing_files_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.packaging.test_docs.ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A heading, with `code`\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_there.py").write_text("def test_one():\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#a-heading-with-code) [b](gone.md) [c](there.md#gone) [d](#gone) [e](https://gone.example)\n"
        "`server/gone.py`, python -m tests.gone\n```\n[f](gone.md)\n```\n"
        "`test_one` `test_one` in `tests/test_there.py`, `test_one` in `tests/test_gone.py`, `test_two`\n"
    )
    assert broken_links(page) == ["gone.md", "there.md#gone", "#gone"]
    assert missing_names(page) == ["server/gone.py", "tests/test_gone.py", "tests.gone"]
    assert missing_tests(page) == ["test_one", "test_two"]


def test_every_decision_is_in_the_index():
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", (DECISIONS / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(path.name for path in DECISIONS.glob("[0-9]*.md"))
    assert [int(name[:4]) for name in listed] == list(range(1, len(listed) + 1))
    for name in listed:
        title = (DECISIONS / name).read_text(encoding="utf-8").splitlines()[0]
        assert title.startswith(f"# {int(name[:4])}. ")


def test_every_image_is_shown():
    shown = {(page.parent / target).resolve() for page in PAGES for target in _IMAGE.findall(prose(page))}
    assert set((ROOT / "docs" / "images").iterdir()) == shown


def test_what_a_drawing_names_exists():
    drawn = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    named = re.findall(r'class="name">((?:attention|server)/[^<]*)<', drawn)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
