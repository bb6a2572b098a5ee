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
            "--chat --ca ROOT.pem",
        ),
        (
            {"tls_certificate": "c", "tls_client_ca": "r", "identities": "i"},
            "metrics http://",
            "--chat --ca ROOT.pem --cert OWN.pem --key OWN.key",
        ),
    ],
)
def test_it_names_the_options_that_a_client_needs(tokenizer, given, parts, hint):
    served = Served("fake", "nowhere", tokenizer, None, READY, GENERATION)
    lines = ready_lines(served, Settings(**given), 50051, 2)
    assert parts in lines
    assert lines.endswith(hint)


def test_a_token_is_not_shown_to_who_lists_processes(tokenizer):
    served = Served("fake", "nowhere", tokenizer, None, READY, GENERATION)
    *_, hint = ready_lines(served, Settings(tls_certificate="c", identities="i"), 50051, 2).splitlines()
    assert hint.startswith("  try: LONGSPAN_TOKEN=TOKEN ")
    assert "--token" not in hint
    assert len(hint) <= 120


def test_a_model_of_molecules_is_tried_with_one(tokenizer):
    served = Served("annalog", "nowhere", tokenizer, None, READY, GENERATION)
    *_, hint = ready_lines(served, Settings(model="annalog"), 50051, 2).splitlines()
    assert hint.endswith("generate 'CC(=O)Oc1ccccc1C(=O)O'")
