"""Reports as people see them: opened in a real Chromium; ``tests/loadtest/browser/install`` installs it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtest.compare import document
from loadtest.compare.phrases import effective_words
from loadtest.direct.growth.report import render as render_growth
from loadtest.direct.growth.types import Growth, Plan, Survey, Variant
from loadtest.load.report import render as render_load
from loadtest.measuring.types import Interval, Measurement
from loadtest.report import words
from loadtest.report.compare import Progress, render
from loadtest.report.live import Live
from loadtest.report.tradeoff import quality_against_speed
from tests.loadtest.browser import sample
from tests.loadtest.browser.chromium import PHONE, WIDE, executable, launched, opened
from tests.loadtest.test_figures import make_result

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(executable() is None, reason="Chromium is not installed")

CONTRAST = (Path(__file__).parent / "browser" / "contrast.js").read_text()
HOSTILE = (
    "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\"'&<!--{{ 7 * 7 }}\u2028"
)
NOW = Progress("asking vt at 8k", 0.4, 95.0)


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def three():
    return sample.three()


@pytest.fixture(scope="module")
def reports(tmp_path_factory, three):
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("reports")
    pairs = {"three": three, "eleven": sample.eleven(), "beginning": sample.beginning()}
    pairs["failing"] = sample.failing()
    pages = {name: render(*pair) for name, pair in pairs.items()}
    pages["load"] = render_load(make_result(1.0, 2.0, 3.0), make_result(1.5, 2.0))
    pages["growth"] = render_growth(_growth())
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {file.stem: file.as_uri() for file in folder.iterdir()}


def _growth():
    plan = Plan((1024, 4096, 65536), (1, 8), 2, 6, (), 60.0, ())
    variants = tuple(Variant(name, {}, "cpu_paged", None, ()) for name in ("full", "sliding_window", "topk"))
    refused = Variant("flash", {}, "-", "flash needs <CUDA>", ())
    model = {"name": "m", "dtype": "float32", "weights": "int4", "kv_dtype": "float16", "device": "cpu"}
    survey = Survey(model, {}, "folder", (*variants, refused), ("a note",), plan.contexts)
    growth = Growth("now", {"cores": 2, "cpu": "c"}, plan, survey, busy="this machine is too busy")
    for number, variant in enumerate(variants, start=1):
        for point, lap, visit in itertools.product(growth.points, range(6), range(2)):
            seconds = 0.005 + 1e-6 * point.context * point.streams / number * (1 + 0.01 * lap)
            figures = {"tpot": seconds}
            growth.measurements.append(
                Measurement(variant.name, point.label, lap, visit, 0, 0.0, 1.0, figures)
            )
    return growth


KINDS = ("three", "eleven", "beginning", "failing", "load", "growth")
VIEWS = tuple(itertools.product((WIDE, PHONE), ("light", "dark")))
# Of most kinds each size and each scheme once; all four of all in `make stress`.
TWO = (VIEWS[0], VIEWS[3])


@pytest.mark.parametrize(
    ("kind", "views"),
    [
        ("three", VIEWS),
        *((kind, TWO) for kind in KINDS[1:]),
        *(pytest.param(kind, VIEWS, marks=pytest.mark.stress) for kind in KINDS[1:]),
    ],
)
def test_a_page_needs_nothing_fits_a_phone_and_can_be_read(browser, reports, kind, views):
    pages = {}
    for size, scheme in views:
        with opened(browser, reports[kind], size, scheme) as page:
            across = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert across[0] <= across[1], f"{kind} at {size[0]} is {across[0]} wide"
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            found = page.evaluate(CONTRAST, 4.5)
            assert found["seen"] > 40
            assert found["poor"] == [], f"{kind}, {scheme}"
            pages[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            # Of a figure exactly one form is shown, and it has a name for readers who can't see it.
            forms = page.evaluate(
                "[...document.querySelectorAll('figure')].map((figure) => [...figure.querySelectorAll('svg')]"
                ".filter((svg) => svg.checkVisibility()).map((svg) => svg.querySelector('desc').textContent))"
            )
            assert forms
            assert all(len(shown) == 1 and shown[0] for shown in forms)
            assert page.faults == []
            assert [url for url in page.asked if not url.startswith("data:")] == [reports[kind]]
    assert pages["light"] != pages["dark"]


def test_every_figure_of_the_judgment_is_in_its_row(browser, reports):
    with opened(browser, reports["three"]) as page:
        found = json.loads(page.locator("#document").text_content())
        shown = dict(
            page.evaluate(
                "[...document.querySelectorAll('#figures-table tbody tr')].map((row) => [row.dataset.key, "
                "[...row.cells].map((cell) => cell.textContent.trim())])"
            )
        )
        text = page.evaluate("document.getElementById('main').textContent")
    judgment, checked, asked = found["judgment"], 0, []
    for verdict in judgment["verdicts"]:
        assert verdict["command"] in text
        lengths = [verdict[name] for name in ("effective", "effective_least", "effective_most")]
        assert None not in lengths
        assert f"Effective length: {effective_words(*lengths)}." in text
        for number, one in enumerate(verdict["evidence"]):
            row, unit = shown[f"test {number} {verdict['deployment']}"], one["unit"]
            assert row[4] == words.quality(unit, _number(one["full"]))
            assert row[5] == words.quality(unit, _number(one["own"]))
            assert row[6] == _joined(lambda value, unit=unit: words.loss(unit, value), one["loss"])
            assert row[7] == str(one["loss"]["count"])
            assert row[8] == words.loss(unit, one["margin"])
            assert row[9].strip("()") == one["outcome"]
            assert row[10] == (words.NONE if one["more"] is None else f"{one['more']:,}")
            if one["contexts"] > 1:
                assert f"{one['loss']['count']} samples of {one['contexts']} contexts" in text
            if turns := one["turns"]:
                asked.append(turns)
                for when in ("first", "later"):
                    own, full = (words.plain(turns[f"{when}_{who}"]) for who in ("own", "full"))
                    assert f"{when} questions {own} of {turns[when]} (full {full})" in text
                lost = _joined(lambda value: words.loss("score", value), turns["difference"])
                assert f"a later one loses more by {lost.replace('(', ' (')}" in text
            assert one["where"] in text
            assert one["note"] in text
            checked += 1
        for number, one in enumerate(verdict["likeness"]):
            for name, unit, show in (("kl", "logprob", words.loss), ("same", "agreement", words.quality)):
                row = shown[f"{name} {number} {verdict['deployment']}"]
                figure = one["kl" if name == "kl" else "same_top"]
                assert row[2] == words.tokens(one["length"])
                assert row[6] == _joined(lambda value, show=show, unit=unit: show(unit, value), figure)
                checked += 1
        for number, one in enumerate(verdict["gains"]):
            row = shown[f"gain {number} {verdict['deployment']}"]
            assert row[2] == words.tokens(one["context"])
            for place, name in ((4, "full"), (5, "own")):
                assert row[place] == _joined(
                    lambda value, figure=one["figure"]: words.measured(figure, value), one[name]
                )
            assert row[6] == _joined(words.ratio, one["ratio"])
            checked += 1
    assert len(shown) == checked > 30
    assert asked
    for sentence in [*judgment["advice"]["sentences"], *judgment["uninformative"]]:
        assert sentence in text


def test_it_prints_on_white_within_the_paper(browser, reports):
    with opened(browser, reports["three"], (718, 1000), "dark") as page:  # A4 without its margins
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("document.documentElement.scrollWidth") <= 718
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(CONTRAST, 4.5)["poor"] == []
        assert not page.locator(".copy").first.is_visible()


def _number(value):
    return math.nan if value is None else value


def _joined(show, interval):
    found = Interval(*(_number(interval[name]) for name in ("value", "low", "high")), interval["count"])
    return show(found.value) + words.ends(show, found)


def test_tables_sort_by_mouse_and_keyboard(browser, reports):
    with opened(browser, reports["eleven"]) as page:

        def column(number):
            keys = page.evaluate(
                "(number) => [...document.querySelectorAll('#figures-table tbody tr')]"
                ".map((row) => row.cells[number].dataset.value)",
                number,
            )
            return [float(key) for key in keys if key != ""], [key == "" for key in keys]

        head = page.locator("#figures-table th", has_text="against full")
        assert head.get_attribute("aria-sort") == "none"
        before = column(6)[0]
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert column(6)[0] == sorted(before) != before
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        assert column(6)[0] == sorted(before, reverse=True)
        margins = page.locator("#figures-table th", has_text="margin")
        for _ in range(2):  # what has no margin stays at the end either way
            margins.locator("button").press("Space")
            empty = column(8)[1]
            assert empty == sorted(empty)
            assert any(empty)
        assert head.get_attribute("aria-sort") == "none"
        assert page.locator("#said").text_content() == "Sorted by margin, descending."
        assert page.faults == []


def test_commands_are_copied_and_the_document_is_downloaded(browser, reports, three, tmp_path):
    comparison, judgment = three
    with opened(browser, reports["three"]) as page:
        page.locator("#advice .copy").click()
        page.locator("#said", has_text="copied").wait_for(state="attached")
        assert page.evaluate("navigator.clipboard.readText()") == judgment.advice.command
        with page.expect_download() as download:
            page.locator("#download").click()
        download.value.save_as(tmp_path / "kept.json")
        assert download.value.suggested_filename == "longspan-compare.json"
        assert page.faults == []
    assert document.plain(document.load(tmp_path / "kept.json")) == document.plain(comparison)


@pytest.mark.parametrize("size", [WIDE, PHONE])
@pytest.mark.parametrize("kind", ["three", "eleven", "failing"])
def test_names_in_the_plots_lie_on_nothing(browser, reports, kind, size):
    boxes_of = """(form) => [...document.querySelectorAll(`#drawings ${form} svg`)].map((svg) => [
      svg.getBoundingClientRect().toJSON(),
      [...svg.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect().toJSON()]),
    ])"""
    with opened(browser, reports[kind], size) as page:
        drawings = page.evaluate(boxes_of, ".narrow" if size == PHONE else ".wide")
    assert len(drawings) >= 2
    for frame, texts in drawings:
        for name, box in texts:
            assert box["left"] >= frame["left"] - 1, name
            assert box["right"] <= frame["right"] + 1, name
            assert box["bottom"] <= frame["bottom"] + 1, name
        for (name, box), (other, beside) in itertools.combinations(texts, 2):
            width = min(box["right"], beside["right"]) - max(box["left"], beside["left"])
            height = min(box["bottom"], beside["bottom"]) - max(box["top"], beside["top"])
            # Boxes of lines that follow one another share the room for descenders.
            assert width <= 1 or height <= 4, f"{name!r} and {other!r}"


def test_hostile_words_stay_words(browser, tmp_path):
    found, judged = sample.hostile(HOSTILE)
    file = tmp_path / "hostile.html"
    file.write_text(render(found, judged), encoding="utf-8")
    with opened(browser, file.as_uri()) as page:
        assert page.evaluate("window.ran") is None
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert page.evaluate("document.scripts.length") == 2
        kept = json.loads(page.locator("#document").text_content())
        assert kept["plan"]["text"] == kept["answers"][0]["predicted_answer"] == HOSTILE
        assert page.evaluate("document.getElementById('advice').textContent.split('<img').length") > 2
        page.locator("#figures-table th button").first.click()
        assert page.faults == []


def test_a_live_page_follows_the_run_and_keeps_its_readers_state(browser, three):
    early = sample.three(rounds=6)
    with closing(Live()) as live:
        live.update(*early, NOW)
        with opened(browser, live.address) as page:
            assert "asking vt at 8k" in page.locator("#progress").text_content()
            page.locator("#figures-table th", has_text="against full").locator("button").click()
            page.locator("details summary").first.click()
            page.evaluate("scrollTo(0, document.getElementById('evidence').offsetTop)")
            page.evaluate("document.querySelector('#figures .scrolls').scrollTop = 120")
            page.evaluate("window.kept = document.getElementById('head')")
            where = page.evaluate("scrollY")
            assert where > 500
            live.update(*three, Progress("measuring round 7", 0.7, math.nan))
            page.locator("#progress", has_text="round 7").wait_for()
            key = "#figures-table tr[data-key^='gain 0'] td:nth-child(8)"
            assert page.locator(key).first.text_content() == "8"
            assert page.locator("#figures-table th", has_text="against full").get_attribute("aria-sort") == (
                "ascending"
            )
            values = page.evaluate(
                "[...document.querySelectorAll('#figures-table tbody tr')]"
                ".map((row) => row.cells[6].dataset.value).filter((key) => key !== '').map(Number)"
            )
            assert values == sorted(values)
            assert page.locator("details").first.evaluate("(one) => one.open")
            assert page.evaluate("document.querySelector('#figures .scrolls').scrollTop") == 120
            assert abs(page.evaluate("scrollY") - where) < 60
            # An unchanged part is the same element as before.
            assert page.evaluate("window.kept === document.getElementById('head')")
            page.evaluate("window.evidence = document.getElementById('evidence')")
            live.progress(Progress("measuring round 8", 0.8, 200.0))
            page.locator("#progress", has_text="round 8").wait_for()
            assert "3 min left" in page.locator("#progress").text_content()
            assert page.evaluate("window.evidence === document.getElementById('evidence')")
            assert page.evaluate("JSON.parse(document.getElementById('document').textContent)") is None
            live.end(*three)
            page.locator("#progress").wait_for(state="detached")
            assert page.locator("#said").text_content() == "The comparison is finished."
            page.locator("#summary-table th button").first.click()
            assert json.loads(page.locator("#document").text_content())["judgment"]
            assert page.locator("#download").is_visible()
            assert page.faults == []


def test_a_page_whose_run_ends_early_says_so(browser, three):
    with closing(Live()) as live:
        live.update(*three, NOW)
        with opened(browser, live.address) as page:
            page.locator("#progress").wait_for()
            live.close()
            page.locator("#progress", has_text="The run has ended").wait_for(timeout=15_000)
            assert page.locator("#figures-table tbody tr").count() > 30


def test_a_picture_for_the_docs_is_made_of_a_document(three, tmp_path):
    document.save(three[0], tmp_path / "kept.json")
    files = [str(tmp_path / "kept.json"), str(tmp_path / "shot.png")]
    command = [sys.executable, "-m", "tests.loadtest.browser.screenshot", *files, "--height", "800"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    head = (tmp_path / "shot.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) == (1200, 800)


def test_a_drawing_is_a_file_of_its_own(browser, three, tmp_path):
    drawing = quality_against_speed(*three)
    drawing.write(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert "var(" not in text
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    with opened(browser, (tmp_path / "plot.svg").as_uri()) as page:
        assert page.faults == []
        assert page.evaluate("document.querySelectorAll('text').length") > 10
