"""Known figures of the real default model, on real servers."""

import math
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest import texts
from loadtest.compare import holding
from loadtest.compare.evaluator import Evaluator
from loadtest.compare.known import EXPECTED, MANY, Figure
from loadtest.compare.presets import BARE, SINKS
from loadtest.compare.types import Comparison, Plan
from loadtest.compare.units import Unit
from loadtest.deployment import FULL, window
from loadtest.evaluation.memory import pages_held
from loadtest.evaluation.text import decode_slice, slices, tokens
from loadtest.measuring.servers import open_all
from loadtest.servers import serve
from longspan import Client

pytestmark = pytest.mark.long

TEXT = texts.prose(texts.reference())
TRAINED, BEYOND = 8192, 12288


@pytest.mark.stress  # a minute; make quality holds all figures, and test_known.py tries how they are held
@pytest.mark.timeout(900)
def test_a_window_needs_sinks_and_sees_what_it_holds(default_model):
    """The figures at the shortest context, by two slices of text and one context of needles."""
    candidates = (FULL, SINKS, BARE)
    wanted = [
        each
        for each in EXPECTED
        if each.length == 1024
        and each.deployment in {one.name for one in candidates}
        and (each.figure in (Figure.PERPLEXITY, Figure.LOGPROB) or each.task == MANY)
    ]
    found = Comparison(Plan(candidates, (1024,), (), (MANY,), "the manual", ""), "", {})
    arguments = ("--kv-memory", "128MiB", "--max-context", "1100", "--threads", "1")
    with open_all(candidates, arguments) as targets, ExitStack() as stack:
        clients = {
            name: stack.enter_context(Client(target.host, target.port)) for name, target in targets.items()
        }
        evaluator = Evaluator(found, clients[FULL.name], text=TEXT, prose=TEXT, contexts=1)
        # Of fewer slices than two nothing is claimed.
        for unit in (Unit("text", 1024), Unit("text", 1024, 1), Unit("answers", 1024, 0, MANY)):
            evaluator.run(unit, clients).add_to(found)
    findings = holding.hold(found, wanted)
    assert [each.figure for each in wanted].count(Figure.FOUND) == 3
    assert {each.figure for each in wanted} == {Figure.PERPLEXITY, Figure.LOGPROB, Figure.FOUND}
    assert not [finding for finding in findings if finding.held is not holding.Held.YES]


@pytest.mark.stress  # two prompts of 12,288 tokens
@pytest.mark.timeout(3600)
def test_in_cache_positions_go_on_beyond_the_trained_length(default_model):
    """Text half again beyond the trained length: full attention loses it, a window keeps it and its pages."""
    near = window(1020, 4)
    near = replace(near, options={**near.options, "positions": "cache"})
    # Unless the frequencies are said to stay, full attention is refused any context beyond the model's own.
    long = ("--max-context", str(BEYOND + 64), "--kv-memory", "1GiB")
    nats = []
    for arguments in ((*FULL.arguments, "--rope-scaling", "default"), near.arguments):
        with serve(*arguments, *long) as server, Client(server.host, server.port) as client:
            part = slices(tokens(client, TEXT, 2 * BEYOND), BEYOND, 0)[0]
            part = replace(part, starts=tuple(start for start in part.starts if start >= TRAINED))
            decoded = decode_slice(client, part, 0)
            held = pages_held(client, part.ids[: BEYOND - 40], output_tokens=40)
            page_size = client.server_info().load.page_size
        logprobs = [logprob for block in decoded for logprob in block.logprobs]
        nats.append(-math.fsum(logprobs) / len(logprobs))
    ratio = math.exp(nats[1] - nats[0])
    print(f"perplexity {math.exp(nats[1]):.2f} to {math.exp(nats[0]):.2f} ({ratio:.3f}), {held} pages")
    assert len(part.starts) >= 4
    assert ratio <= 0.85
    assert held <= math.ceil(1024 / page_size) + 2


@pytest.mark.stress  # twenty minutes
@pytest.mark.timeout(3600)
def test_the_preset(tmp_path):
    """``make quality``: all figures are as known."""
    command = [str(Path(sys.executable).parent / "longspan"), "compare", "--preset", "known"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "known.json")],
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "FAIL" not in done.stdout
