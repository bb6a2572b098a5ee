from __future__ import annotations

import msgspec
import pytest

from tests.engine import gpu_check


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Fewer tokens than on a GPU: it is the check that is tried here."""
    given = gpu_check.requests()
    monkeypatch.setattr(
        gpu_check, "requests", lambda: [msgspec.structs.replace(one, max_tokens=6) for one in given]
    )


def test_the_check_for_gpus_passes_on_the_cpu(capsys):
    """So that it is known to work where there is a GPU."""
    assert gpu_check.main("cpu", "auto", ("llama",)) == 0
    assert capsys.readouterr().out.count(": ok") == len(gpu_check.CASES) - 1


def test_other_tokens_are_a_failure(monkeypatch, capsys):
    given = gpu_check.tokens

    def tokens(folder, case, **settings):
        found, captured = given(folder, case, **settings)
        return [[*row, settings["kernel"] == "auto"] for row in found], captured

    monkeypatch.setattr(gpu_check, "tokens", tokens)
    monkeypatch.setattr(gpu_check, "CASES", {"full": {}})
    assert gpu_check.main("cpu", "auto", ("llama",)) == 1
    assert "5 of 5 sequences got other tokens" in capsys.readouterr().out
