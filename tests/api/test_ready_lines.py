"""The lines that a server prints say how to reach it."""

from __future__ import annotations

import pytest

from server.api.state import Served
from server.ready_lines import ready_lines
from server.settings import Settings
from tests.api.conftest import GENERATION
from tests.api.fake_engine import READY


@pytest.mark.parametrize(
    ("given", "parts", "hint"),
    [
        ({}, " kernel, metrics http://127.0.0.1:2/metrics\n  try:", "--chat"),
        ({"metrics": False}, " kernel\n  try:", "--chat"),
        (
            {"tls_certificate": "c", "metrics_tls": True},
            "metrics https://127.0.0.1:2/metrics",
            "--chat --tls --ca ROOT.pem",
        ),
        (
            {"tls_certificate": "c", "tls_client_ca": "r", "identities": "i"},
            "metrics http://",
            "--tls --ca ROOT.pem --cert OWN.pem --key OWN.key --token TOKEN",
        ),
    ],
)
def test_it_names_the_options_that_a_client_needs(tokenizer, given, parts, hint):
    served = Served("fake", "nowhere", tokenizer, None, READY, GENERATION)
    lines = ready_lines(served, Settings(**given), 50051, 2)
    assert parts in lines
    assert lines.endswith(hint)
