from __future__ import annotations

from tests.engine import gpu_check


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
