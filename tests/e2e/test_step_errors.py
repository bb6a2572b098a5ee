"""Errors in steps of a real engine end the requests that cause them; a backend of a package raises them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from longspan import LongspanError
from tests.e2e.here import serving
from tests.packages import install

# Sees all, and from a moment on refuses to compute what stands at position 90.
FAULTY = """
import os
from attention import Backend
from attention.patterns.options import NumberedPattern, ranges
class Faulty(NumberedPattern):
    name = "faulty"
    numbers = {"window": (10_000, 1)}
    def __init__(self, window, dense_layers=()):
        self.window, self.dense_layers = window, dense_layers
    def visible(self, query_positions, key_positions):
        near = query_positions - key_positions < self.window
        return near & (key_positions <= query_positions)
    def spans(self, positions):
        if (positions == 90).any() and os.path.exists(os.environ["FAULT"]):
            raise ValueError("nothing may stand at position 90")
        return ranges(((positions - self.window + 1).clamp(min=0), positions + 1))
    def expired(self, seq_len, page_size):
        return range(0)
BACKEND = Backend(Faulty.from_options)
"""
ASKED = [([i + 3] * (5 + 4 * i), 12 + 5 * i) for i in range(6)]  # prompts and lengths, 79 tokens at most


@pytest.fixture
def faulty(tmp_path, tiny_settings, monkeypatch):
    install(tmp_path, "faulty", {"longspan.backends": {"faulty": "faulty:BACKEND"}}, FAULTY)
    fault = tmp_path / "fault"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAULT", str(fault))
    with serving(**tiny_settings, attention="faulty") as server:
        yield server, fault
    sys.modules.pop("faulty")


def test_an_error_in_a_step_ends_the_requests_that_cause_it_and_no_other(faulty):
    server, fault = faulty

    def answer(prompt, tokens):
        with server.client() as client:
            return list(
                client.generate(prompt, max_tokens=tokens, ignore_eos=True, temperature=0.8, seed=4).token_ids
            )

    def code_of(prompt, tokens):
        with pytest.raises(LongspanError) as caught:
            answer(prompt, tokens)
        return caught.value.code, str(caught.value)

    alone = [answer(*asked) for asked in ASKED]
    assert len(answer([5] * 100, 20)) == 20
    fault.touch()
    with ThreadPoolExecutor(12) as pool:
        for _ in range(3):
            faulty_ones = [pool.submit(code_of, *asked) for asked in (([7] * 100, 5), ([9] * 130, 20))]
            assert list(pool.map(lambda asked: answer(*asked), ASKED)) == alone
            for one in faulty_ones:
                code, sentence = one.result(30)
                assert code is grpc.StatusCode.INTERNAL
                assert "the server's log has the details under request" in sentence
    server.wait_idle()
    assert server.log.count("ValueError: nothing may stand at position 90") == 6
    assert server.restarts("died") == 0
