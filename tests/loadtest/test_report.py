"""Parts of reports without a browser: numbers, ticks, places of names, and the live page's server."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import re
import socket
import threading
import time
from contextlib import closing
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.compare.judge import judge
from loadtest.load import report as load_report
from loadtest.measuring.types import Interval
from loadtest.report import labels, view, words
from loadtest.report.compare import Progress, render
from loadtest.report.live import Live
from loadtest.report.look import DARK, LIGHT, look
from loadtest.report.scale import Axis, log_ticks, round_ticks, span
from loadtest.report.tradeoff import quality_against_speed
from tests.loadtest.browser import sample
from tests.loadtest.synthetic import Sizes, draw
from tests.loadtest.test_figures import make_result

SIZES = st.floats(1e-9, 1e9)


@given(st.floats(-1e9, 1e9), SIZES, st.integers(2, 12))
def test_ticks_are_few_round_and_within(low, width, most):
    high = low + max(width, abs(low) * 1e-6)
    ticks = round_ticks(low, high, most)
    assert len(ticks) <= most
    room = (high - low) * 1e-6 + 1e-9
    assert all(low - room <= tick <= high + room for tick in ticks)
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


@given(SIZES, st.floats(1.5, 1e6), st.integers(3, 12))
def test_ticks_of_a_logarithmic_axis_are_few_and_within(low, times, most):
    ticks = log_ticks(low, low * times, most)
    assert len(ticks) <= most
    assert all(low * 0.999 <= tick <= low * times * 1.001 for tick in ticks)


@given(st.lists(st.floats(allow_nan=True), max_size=9), st.booleans())
def test_an_axis_has_room_for_all_its_values(values, log):
    small = [value for value in values if not abs(value) > 1e12 and not 0 < abs(value) < 1e-12]
    low, high = span(small, log=log)
    assert math.isfinite(low)
    assert low < high
    axis = Axis("x", low, high, log)
    for value in small:
        if math.isfinite(value) and (value > 0 or not log):
            assert -1e-9 <= axis.share(axis.inside(value)) <= 1 + 1e-9
            assert axis.inside(value) == value


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.measured("tpot", 0.00546), "5.46 ms"),
        (words.measured("ttft", 9.71), "9.71 s"),
        (words.measured("bytes", 23.2 * 2**20), "23.2 MiB"),
        (words.measured("output_rate", 182.4), "182 tok/s"),
        (words.measured("fits", 1234.0), "1,234"),
        (words.measured("fits", math.nan), words.NONE),
        (words.loss("perplexity", 0.0404), "+4.0%"),
        (words.loss("perplexity", -0.00004), "0.0%"),
        (words.loss("score", -0.012), "\N{MINUS SIGN}1.2 points"),
        (words.loss("logprob", 0.1234), "+0.123 nats"),
        (words.quality("score", 0.9333), "93.3%"),
        (words.ratio(12.34), "12.3\N{MULTIPLICATION SIGN}"),
        (words.ends(words.ratio, Interval(1.3, 1.2, 1.4, 9)), "(1.20 to 1.40\N{MULTIPLICATION SIGN})"),
        (words.ends(words.seconds, Interval(0.9, 0.8, 1.1, 9)), "(800 ms to 1.10 s)"),
        (words.ends(words.ratio, Interval(2.0, 2.0, 2.0, 1)), ""),
        (words.ends(words.ratio, Interval(2.0, count=3)), "(no interval)"),
        (words.ends(words.ratio, Interval()), ""),
        (words.duration(95.0), "2 min"),
    ],
)
def test_figures_are_written_with_their_units(written, expected):
    assert written == expected


@given(
    st.lists(st.tuples(st.floats(0, 600), st.floats(0, 300)), max_size=6),
    st.floats(20, 90),
)
def test_names_stay_within_the_room(points, width):
    room = labels.Box(0, 0, 600, 300)
    boxes = labels.place(points, [(width, 14.0)] * len(points), room)
    assert len(boxes) == len(points)
    for box in boxes:
        assert box.shared(room) > 0.99 * box.area


def test_eleven_series_look_different_and_every_color_has_a_dark_form():
    looks = [look(number) for number in range(11)]
    assert len({one.shape for one in looks}) == 11
    assert len({(one.color, one.dash) for one in looks}) == 11
    assert {one.color for one in looks} <= {f"var(--{name})" for name in LIGHT}


@pytest.mark.parametrize("colors", [LIGHT, DARK])
def test_marks_and_outcomes_stand_out_from_the_page(colors):
    def light(color):
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, color in colors.items():
        if name not in ("page", "card", "line"):
            one, other = sorted((light(color), light(colors["card"])))
            assert (other + 0.05) / (one + 0.05) >= 3, name


def test_the_oracle_is_not_offered_for_serving():
    found, judgment = sample.oracle()
    page = render(found, judgment)
    assert page.count("A measure of the others, not for serving") == 1
    assert 'aria-label="Copy the command that serves oracle 512"' in page
    drawing = quality_against_speed(found, judgment)
    assert "top-k 512" in drawing.wide
    assert "oracle 512" not in drawing.wide
    assert "oracle 512" in drawing.caption


@pytest.fixture
def live():
    with closing(Live()) as found:
        found.update(*sample.beginning(), Progress("beginning", 0.1, 60.0))
        yield found


def ask(live, path="/", method="GET", host=None):
    address = urlsplit(live.address)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    connection.request(method, path, headers={"Host": host or address.netloc})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_a_live_page_is_served_only_to_this_machine(live):
    answer, body = ask(live)
    assert answer.status == 200
    assert "Still measuring" in body
    assert answer.getheader("X-Frame-Options") == "DENY"
    assert answer.getheader("Access-Control-Allow-Origin") is None
    port = urlsplit(live.address).port
    assert ask(live, host=f"localhost:{port}")[0].status == 200
    for host in ("example.com", f"example.com:{port}", "127.0.0.1", f"127.0.0.1.example.com:{port}"):
        answer, body = ask(live, host=host)
        assert answer.status == 403
        assert "Still measuring" not in body
        assert ask(live, "/next?after=-1", host=host)[0].status == 403
    assert ask(live, "/../../etc/passwd")[0].status == 404
    assert ask(live, "//etc/passwd")[0].status == 404
    assert ask(live, "/next?after=x")[0].status == 400
    for method in ("POST", "PUT", "OPTIONS", "HEAD"):
        assert ask(live, method=method)[0].status == 405
    outside = [each[4][0] for each in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for name in {each for each in outside if not each.startswith("127.")}:
        with pytest.raises(OSError, match=r"refused|timed out"), socket.create_connection((name, port), 2):
            pass


def test_a_page_that_waits_for_an_update_gets_the_last_one_before_the_server_ends():
    live = Live()
    found = sample.beginning()
    live.update(*found, Progress("beginning", 0.1, 60.0))
    first = json.loads(ask(live, "/next?after=-1")[1])
    assert first["version"] == 1
    assert not first["ended"]
    updates = []
    waiting = threading.Thread(target=lambda: updates.append(ask(live, "/next?after=1")[1]))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    live.progress(Progress("half of it", 0.5, 30.0))
    waiting.join(10)
    half = json.loads(updates.pop())
    assert half["version"] == 2
    assert "html" not in half
    assert "half of it" in half["progress"]
    waiting = threading.Thread(target=lambda: updates.append(ask(live, "/next?after=2")[1]))
    waiting.start()
    live.end(*found)
    waiting.join(10)
    last = json.loads(updates[0])
    assert last["ended"]
    assert last["version"] == 3
    assert "Still measuring" not in last["html"]
    with pytest.raises(ConnectionRefusedError):
        ask(live)
    live.close()


def test_a_page_that_is_between_two_questions_gets_the_last_version_too(live):
    assert json.loads(ask(live, "/next?after=-1")[1])["version"] == 1
    ending = threading.Thread(target=live.end, args=sample.beginning())
    ending.start()
    while not live.closing:
        time.sleep(0.01)
    time.sleep(0.2)
    last = json.loads(ask(live, "/next?after=1")[1])
    assert last["ended"]
    assert "html" in last
    ending.join(1)
    assert not ending.is_alive()


def test_the_end_waits_for_no_page_where_none_was_open(monkeypatch):
    monkeypatch.setattr("loadtest.report.live._LINGER", 60.0)
    found, live = sample.beginning(), Live()
    live.update(*found, Progress("beginning", 0.1, 60.0))
    began = time.monotonic()
    live.end(*found)
    assert time.monotonic() - began < 30


def test_a_port_that_is_taken_is_an_error_at_once(live):
    with pytest.raises(OSError, match="in use"):
        Live(urlsplit(live.address).port)


def test_a_load_test_shows_before_and_after():
    before, after = make_result(1.0, 2.0), make_result(2.0, 2.0, 3.0, seed=5)
    page = load_report.render(after, before)
    table = page.partition('id="against-table"')[2].partition("</table>")[0]
    rows = re.findall(r'data-value="([^"]+)">\1</th><td data-value="([^"]+)">\2</td><td[^>]*>([^<]+)', table)
    rates = [result.runs[0].summary.output_rate for result in (before, after)]
    assert rows[:3] == [
        ("1 user", "before", f"{rates[0]:.2f}"),
        ("1 user", "after", f"{rates[1]:.1f}"),
        ("1 user", "after / before", f"{rates[1] / rates[0]:.2f}\N{MULTIPLICATION SIGN}"),
    ]
    assert {row[0] for row in rows} == {"1 user", "2 users"}
    assert "only in one of the two: 3 users" in page
    assert 'id="against-table"' not in load_report.render(after)


def test_a_cell_without_a_figure_has_no_sort_key():
    unread = replace(sample.beginning()[0], text=[])
    page = render(unread, judge(unread))
    summary = page.partition('id="summary-table"')[2].partition("</table>")[0]
    assert f'<td data-value="">{words.NONE}' in summary
    assert 'data-value="nan"' not in page


def test_a_single_task_is_one_row_and_equal_work_has_no_ratio():
    drawn = draw(1, Sizes(blocks=6, contexts=6, turns=4, rounds=6, tasks=("needles",), noise=0.0))
    judgment = judge(drawn)
    verdict = judgment.verdicts[1]
    assert {one.measure for one in verdict.evidence} >= {"tasks", "task:needles"}
    assert {one.measure for one in view.distinct(verdict.evidence)} == {"text", "tasks"}
    two = judge(draw(1, Sizes(blocks=6, contexts=6, turns=4, rounds=6, noise=0.0))).verdicts[1]
    assert view.distinct(two.evidence) == list(two.evidence)
    assert "the same work" in render(drawn, judgment).partition('id="summary"')[2].partition("</section>")[0]
