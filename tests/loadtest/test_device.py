"""The benchmark of a device: its arithmetic, its verdicts, its processes, and its small form as a whole."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from loadtest.direct import work
from loadtest.direct.device import report
from loadtest.direct.device.bench import bench
from loadtest.direct.device.forms import SMALL, WHOLE
from loadtest.direct.device.rows import rows
from loadtest.direct.device.shapes import LLAMA_8B, TINY
from loadtest.direct.work import NO_TIME, Findings
from loadtest.document import plain, save
from tests.loadtest.device_parts import parts

pytestmark = pytest.mark.long

SOON = 0.0


def test_the_shape_of_8b_is_llamas():
    assert LLAMA_8B.parameters == 8_030_261_248
    assert LLAMA_8B.kv_bytes(2) * LLAMA_8B.positions == 16 << 30


def test_bytes_of_a_decode_step():
    # A layer: q and o 128 x 128, k and v 128 x 64, three of 128 x 256.
    assert TINY.layer_weights == 2 * 16_384 + 2 * 8192 + 3 * 32_768 == 147_456
    # Three layers, seven norms of 128, embedding and head of 512 x 128.
    assert TINY.parameters == 442_368 + 896 + 131_072 == 574_336
    # All but 511 rows of the embedding; keys and values are 3 x 2 x 2 x 32 = 384 numbers a token.
    assert TINY.kv_bytes(4) == 1536
    assert TINY.decode_bytes(36.5, 1, 4, 1536) == 508_928 * 4 + 36.5 * 1536 == 2_091_776
    assert TINY.decode_bytes(100, 4, 2, 768) == (508_928 + 3 * 128) * 2 + 400 * 768 == 1_325_824


def test_sums_of_a_prefill():
    linears, head = 2 * 128 * 442_368, 2 * 65_536
    # Each token sees itself and those before it, in 3 layers of 4 heads: 2 x 32 sums with the key, as many
    # with the value.
    assert TINY.prefill_flops(0, 128) == linears + head + 3 * 4 * 4 * 32 * (128 * 129 // 2) == 126_058_496
    pairs = sum(range(101, 108))
    assert TINY.prefill_flops(100, 7) == 2 * 7 * 442_368 + head + 3 * 4 * 4 * 32 * pairs == 7_442_432


FIGURES = {
    "bandwidth": 4e12,
    "matrix_rate": 800e12,
    "decode_seconds": 4e-3,
    "decode_bytes": 15e9,
    "prefill_seconds": 0.4,
    "prefill_flops": 132e12,
    "batch_rate": 9000.0,
    "single_rate": 200.0,
    "transformers_rate": 3000.0,
    "served_batch_rate": 8500.0,
    "served_single_rate": 189.0,
    "window_short_seconds": 0.005,
    "window_long_seconds": 0.006,
    "top-k_short_seconds": 0.005,
    "top-k_long_seconds": 0.0061,
}


def test_verdicts():
    found = rows(WHOLE, Findings(figures=FIGURES))
    assert [(row.figure, row.against) for row in found[:2]] == [(3750.0, 4000.0), (330.0, 800.0)]
    ratios = [row.ratio for row in found]
    assert ratios == pytest.approx([0.9375, 0.4125, 3.0, 0.9444, 0.945, 1.2, 1.22], abs=1e-4)
    assert [row.aim for row in found] == [0.8, 0.55, 3.0, 0.95, 0.95, 1.2, 1.2]
    verdicts = ["reached", "missed", "reached", "missed", "missed", "reached", "missed"]
    assert [row.verdict for row in found] == verdicts
    assert found[5].what == "decode at 128k under window"
    assert (found[5].figure, found[5].against, found[5].base) == (6.0, 5.0, "the same at 4k")


def test_a_row_says_why_it_has_no_figure():
    figures = {name: figure for name, figure in FIGURES.items() if not name.startswith(("served", "window"))}
    troubles = {"served": "failed: its process was killed by signal 9", "window": NO_TIME}
    found = rows(WHOLE, Findings(figures=figures, troubles=troubles))
    assert [row.verdict for row in found[3:6]] == ["failed", "failed", "left out"]
    assert found[3].ratio is None
    assert found[3].against == 9000.0
    assert found[3].note == "its process was killed by signal 9"
    assert found[5].note == "no time left"


def run(names, folder, seconds=60.0, **options):
    expected = dict.fromkeys(names, SOON)
    return work.run(parts, expected, (folder,), time.monotonic() + seconds, **options)


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and " Z " not in stat(pid)]
        if not alive:
            return True
        time.sleep(0.02)
    return False


def stat(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text()
    return " Z "


def test_a_part_that_fails_or_dies_takes_no_other_along(tmp_path):
    findings = run(["figures", "broken", "pid", "dying", "other pid"], tmp_path)
    assert findings.facts == {"said": "a text"}
    assert findings.failed == ["broken", "dying"]
    assert findings.troubles == {
        "broken": "failed: the disk is full",
        "dying": "failed: its process was killed by signal 9",
    }
    pids = [findings.figures.pop(name) for name in ("pid", "other_pid")]
    assert pids[0] != pids[1]
    assert findings.figures == {"one": 1.0, "before": 2.0, "last": 3.0}


def test_parts_share_a_process_unless_one_is_apart(tmp_path):
    together = run(["pid", "other pid"], tmp_path).figures
    assert together["pid"] == together["other_pid"]
    apart = run(["pid", "other pid"], tmp_path, apart=frozenset({"other pid"})).figures
    assert apart["pid"] != apart["other_pid"]


def test_at_the_end_of_the_time_all_that_runs_is_ended_and_the_rest_left_out(tmp_path):
    began = time.monotonic()
    findings = work.run(parts, {"pid": 500.0, "endless": SOON, "figures": SOON}, (tmp_path,), began + 1.0)
    assert findings.troubles == dict.fromkeys(("pid", "endless", "figures"), NO_TIME)
    assert findings.failed == []
    assert findings.figures in ({"begun": 4.0}, {})
    if (tmp_path / "pids").exists():
        assert gone((tmp_path / "pids").read_text().split())


def test_parts_that_need_one_that_failed_are_left_out(tmp_path):
    findings = run(["broken", "figures"], tmp_path, needed=frozenset({"broken"}))
    assert findings.failed == ["broken"]
    assert findings.troubles["figures"] == "left out: it needs the part broken, which failed"


def test_nothing_outlives_a_benchmark_that_is_killed(tmp_path):
    lines = (
        "import time, pathlib",
        "from loadtest.direct import work",
        "from tests.loadtest.device_parts import parts",
        f"folder = pathlib.Path({str(tmp_path)!r})",
        "work.run(parts, {'endless': 0.0}, (folder,), time.monotonic() + 60)",
    )
    with subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE) as process:
        end = time.monotonic() + 30
        while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert gone((tmp_path / "pids").read_text().split())


def test_the_small_form(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_THREADS", "1")
    document, ran = bench(SMALL, tmp_path / "model", 200.0, Console(quiet=True))
    assert ran
    assert len(document.rows) == 7
    for row in document.rows:
        assert row.verdict in ("reached", "missed")
        assert row.figure > 0
        assert row.against > 0
        assert row.ratio == pytest.approx(row.figure / row.against)
    assert set(FIGURES) < set(document.figures)
    assert all(math.isfinite(figure) and figure > 0 for figure in document.figures.values())
    numbers = 4 if "float32" in document.facts["numbers"] else 2
    # 32 tokens of context, and of 8 steps the middle one.
    assert document.figures["decode_bytes"] == 508_928 * numbers + 36.5 * 384 * numbers
    assert document.figures["prefill_flops"] == 126_058_496
    assert document.facts["model"] == "written"
    assert list(document.seconds) == list(SMALL.seconds)

    file = tmp_path / "device.json"
    save(plain(document), file)
    assert msgspec.json.decode(file.read_bytes(), type=report.Document) == document
    file.write_text(file.read_text().replace('"ratio": ', '"share": ', 1))
    with pytest.raises(msgspec.ValidationError, match="ratio"):
        msgspec.json.decode(file.read_bytes(), type=report.Document)

    console = Console(width=120, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    report.show(replace(document, facts={**document.facts, "device": "[abacus]"}), console)
    shown = console.export_text()
    assert "[abacus]" in shown
    assert all(row.verdict in shown for row in document.rows)


@pytest.mark.parametrize("form", [WHOLE, SMALL], ids=lambda form: form.name)
def test_every_load_fits_the_cache_that_it_is_given(form):
    torch = pytest.importorskip("torch")
    from attention.backends import make_pattern
    from attention.cache import PagedCache
    from attention.types import LayerSpec
    from server.engine.kv_manager import most_pages

    shape = form.shape
    heads = shape.query_heads, shape.kv_heads, shape.head_size, shape.head_size
    layers = [LayerSpec(index, *heads, 1.0) for index in range(shape.layers)]
    dtype = torch.bfloat16 if form.cuda else torch.float32

    def check(settings, count, tokens):
        pattern = make_pattern(settings["attention"], settings["attention_option"])
        pages = settings["kv_memory"] // PagedCache.bytes_per_page(layers, 16, dtype, pattern)
        assert tokens <= settings["max_context"] <= shape.positions
        assert count <= settings["max_running"] <= settings["max_batch_tokens"]
        longest = most_pages(settings["max_context"], settings["max_batch_tokens"], 16, pattern.expired)
        assert longest < pages
        # A page for each running sequence stays free, and page 0 is never allocated.
        assert count * most_pages(tokens, settings["max_batch_tokens"], 16, pattern.expired) + count < pages

    count, prompt, output = form.batch
    check(form.settings("a folder"), count, prompt + output)
    check(form.settings("a folder"), 1, form.prefill_tokens + 1)
    check(form.settings("a folder"), 1, form.decode_context + form.decode_steps + 2)
    for pattern in form.patterns:
        check(form.long_settings("a folder", pattern), 1, max(form.contexts) + form.context_steps + 2)


def test_without_a_gpu_the_whole_form_says_so(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from loadtest.direct.device.parts import PARTS

    with pytest.raises(RuntimeError, match="--small"):
        next(PARTS["machine"](WHOLE, tmp_path))
