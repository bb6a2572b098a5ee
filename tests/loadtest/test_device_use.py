"""A run's use of the server's device: shares, reasons where there is none, documents and tables."""

import json
import math
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from loadtest.load import device, reconcile, result, table
from loadtest.load.device import device_use, watched
from loadtest.load.device_rows import DeviceRow, missing_shares
from loadtest.load.document import save
from loadtest.load.report import render
from tests.loadtest.test_figures import make_result, shown

PAGE = """longspan_engine_step_duration_seconds_sum{{model_name="m",phase="decode"}} {decode}
longspan_engine_step_duration_seconds_sum{{model_name="m",phase="prefill"}} {prefill}
longspan_engine_bytes_total{{model_name="m"}} {moved}
longspan_engine_flops_total{{model_name="m"}} {flops}
longspan_device_memory_bytes{{kind="used",model_name="m kind"}} {used}
longspan_device_memory_bytes{{kind="total",model_name="m kind"}} 8e9
longspan_device_memory_bytes{{kind="kv",model_name="m kind"}} 1e9
"""
MEASURED = """longspan_device_memory_bandwidth_bytes_per_second{model_name="m"} 21e9
longspan_device_matrix_flops_per_second{model_name="m"} 200e9
"""
BEFORE = {"decode": 5, "prefill": 1, "moved": 16e9, "flops": 100e9, "used": 2e9}
# 10 s of steps, 84 GB and 300 billion operations later.
AFTER = {"decode": 12, "prefill": 4, "moved": 100e9, "flops": 400e9, "used": 1e9}


@pytest.fixture
def scraped(tmp_path):
    """A scrape of a page with these figures."""

    def scrape(figures, measured=MEASURED):
        page = tmp_path / "metrics"
        page.write_text(PAGE.format(**figures) + measured)
        return reconcile.scrape(page.as_uri())

    return scrape


def test_shares_are_those_of_the_time_in_steps(scraped):
    use = device_use("GPU", [scraped(BEFORE, ""), scraped({**AFTER, "used": 3e9}), scraped(AFTER)])
    assert (use.bandwidth_share, use.matrix_share) == pytest.approx((0.4, 0.15))
    assert (use.bytes_moved, use.flops, use.step_seconds) == (84e9, 300e9, 10)
    assert (use.memory_used, use.memory_total, use.name) == (3e9, 8e9, "GPU")
    assert use.unmeasured == []


def test_a_share_above_one_is_none(scraped):
    use = device_use("cpu", [scraped(BEFORE), scraped({**AFTER, "moved": 500e9})])
    assert math.isnan(use.bandwidth_share)
    assert use.matrix_share == pytest.approx(0.15)
    (sentence,) = use.unmeasured
    assert sentence.startswith("share of memory bandwidth not measured: it would be 2.30; ")


def test_missing_shares_have_a_reason(scraped):
    before, after = scraped(BEFORE, ""), scraped(AFTER, "")
    use = device_use("cpu", [before, after])
    assert math.isnan(use.bandwidth_share)
    assert math.isnan(use.matrix_share)
    assert use.unmeasured == [
        "share of memory bandwidth and of matrix rate not measured: the server has not measured its device; "
        "start it with --measure-device"
    ]
    idle = device_use("cpu", [scraped(BEFORE), scraped(BEFORE)])
    assert all(sentence.endswith("took no step") for sentence in idle.unmeasured)


def test_a_server_of_an_earlier_version_says_nothing_of_it():
    old = {"longspan_engine_step_duration_seconds_sum": 3.0}
    use = device_use("cpu", [{}, old])
    assert all(sentence.endswith("say nothing of it") for sentence in use.unmeasured)
    assert math.isnan(use.memory_used)
    assert math.isnan(use.memory_total)


def test_the_metrics_are_looked_at_while_a_run_lasts(monkeypatch):
    monkeypatch.setattr(device, "_SAMPLE_SECONDS", 0.01)
    seen = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            Handler.asked += 1
            self.send_response(500 if Handler.asked == 1 else 200)
            self.end_headers()
            self.wfile.write(b'longspan_device_memory_bytes{kind="used"} %d\n' % Handler.asked)
            if Handler.asked == 4:
                seen.set()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with watched(f"http://127.0.0.1:{server.server_port}/metrics") as scrapes:
            assert seen.wait(10)
        server.shutdown()
        thread.join()
    # The first answer was an error.
    assert [scrape['longspan_device_memory_bytes{kind="used"}'] for scrape in scrapes[:2]] == [2, 3]
    with watched(None) as scrapes:
        pass
    assert scrapes == []


def test_a_reason_for_all_rows_is_told_once(scraped):
    (why,) = device_use("cpu", [scraped(BEFORE, ""), scraped(AFTER, "")]).unmeasured
    lacking, whole = (
        DeviceRow(label, ("cpu",), (), notes) for label, notes in [("2 users", (why,)), ("1 user", ())]
    )
    assert missing_shares([replace(lacking, label="1 user"), lacking]) == [why]
    assert missing_shares([whole, lacking]) == [f"2 users: {why}"]
    assert missing_shares([whole]) == []


@pytest.fixture
def measured(scraped):
    """Two runs: one that has all shares, one that lacks one."""
    found = make_result(1.0, 2.0)
    use = device_use("GPU <1>", [scraped(BEFORE), scraped(AFTER)])
    lacking = device_use("GPU <1>", [scraped(BEFORE), scraped({**AFTER, "moved": 500e9})])
    for run, each in zip(found.runs, (use, lacking), strict=True):
        run.device = each
    return found


def test_a_document_keeps_it_and_an_older_one_is_read(measured, tmp_path):
    file = tmp_path / "result.json"
    save(measured, file)
    assert result.load(file).runs[0].device == measured.runs[0].device
    assert math.isnan(result.load(file).runs[1].device.bandwidth_share)
    document = json.loads(file.read_text())
    assert document["runs"][1]["device"]["bandwidth_share"] is None
    for run in document["runs"]:
        del run["device"]
    file.write_text(json.dumps(document))
    assert [run.device for run in result.load(file).runs] == [None, None]


def device_table(report):
    return report.partition('id="device"')[2].partition("</section>")[0]


def test_repeats_are_one_row_without_those_that_were_disturbed(measured):
    quiet, other = measured.runs
    used = [replace(quiet.device, memory_used=gigabytes * 1e9) for gigabytes in (2.0, 3.0, 7.0)]
    repeats = [replace(quiet, repeat=number, device=use) for number, use in enumerate(used)]
    repeats.append(replace(quiet, repeat=3, device=replace(quiet.device, memory_used=99e9), disturbed="x"))
    measured.runs = [*repeats, other]
    table_ = device_table(render(measured))
    assert table_.count("<tr") == 1 + 2
    assert ">3.00</td>" in table_
    assert "99.0" not in table_


def test_tables_and_reports_show_it(measured):
    text = shown(table.runs_table(measured))
    lines = text.partition("GPU <1>")[2].splitlines()
    (first, second) = (line.split() for line in lines if re.match(r"\d users? +\d", line))
    assert first[-6:] == ["2.00", "8.00", "21.0", "40.0", "200", "15.0"]
    assert second[-6:] == ["2.00", "8.00", "21.0", "-", "200", "15.0"]
    assert "2 users: share of memory bandwidth not measured: it would be 2.30" in " ".join(text.split())
    report = render(measured)
    assert "<h2>Device: GPU &lt;1&gt;</h2>" in report
    assert ">40.0</td>" in report
    assert "not measured: it would be 2.30" in report
    assert device_table(report).count("<tr") == 1 + 2
    measured.runs = [replace(run, device=None) for run in measured.runs]
    assert "GPU <1>" not in shown(table.runs_table(measured))
    assert "Device: " not in render(measured)
