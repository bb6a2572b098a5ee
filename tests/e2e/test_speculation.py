"""A server that speculates: the answers of one that does not, in fewer steps, and what it says of that."""

from __future__ import annotations

import pytest

from tests.e2e.here import serving
from tests.models_zoo import save_tiny

pytestmark = pytest.mark.long

TEXT = "The quick brown fox jumps over the lazy dog. " * 9
REQUESTS = [
    {"temperature": 0, "max_tokens": 60, "ignore_eos": True},
    {"temperature": 0, "max_tokens": 60, "stop": ["lazy dog"], "ignore_eos": True},
    {"temperature": 0.7, "seed": 4, "max_tokens": 24, "n": 2, "logprobs": 2},
    {"temperature": 0.6, "seed": 5, "max_tokens": 24, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
]


def told(answer):
    """With rounded log probabilities: rows attended together differ from single ones in their last bits."""
    return [
        (one.text, list(one.token_ids), one.finish_reason, [logprobs(entry) for entry in one.logprobs])
        for one in answer.completions
    ]


def logprobs(entry):
    return [(each.token_id, pytest.approx(each.logprob, abs=1e-4)) for each in (entry.chosen, *entry.top)]


def test_the_same_answers_in_fewer_steps(server):
    with serving(speculate="ngram", draft_tokens=6) as drafting:
        with server.client() as client:
            assert not client.model_info().HasField("speculation")
            plain = [client.generate(TEXT, **request) for request in REQUESTS]
            assert all(answer.usage.draft_tokens == 0 for answer in plain)
        with drafting.client() as client:
            info = client.model_info().speculation
            assert (info.method, info.draft_tokens) == ("ngram", 6)
            answers = [client.generate(TEXT, **request) for request in REQUESTS]
            stream = client.stream(TEXT, **REQUESTS[1])
            assert "".join(delta.text for delta in stream) == plain[1].text
        assert [told(answer) for answer in answers] == [told(answer) for answer in plain]
        usages = [*(answer.usage for answer in answers), stream.usage]
        for usage in usages:
            assert usage.accepted_draft_tokens <= min(usage.draft_tokens, usage.completion_tokens)
        assert usages[0].accepted_draft_tokens > 20
        drafting.wait_idle()
        metrics = drafting.metrics()
        # The engine may have gone on for a while past a stop string.
        assert metrics["longspan_draft_tokens_total"] >= sum(usage.draft_tokens for usage in usages)
        accepted = metrics["longspan_accepted_draft_tokens_total"]
        assert accepted >= sum(usage.accepted_draft_tokens for usage in usages)
        decoded = sum(usage.completion_tokens for usage in usages)
        assert metrics['longspan_engine_step_duration_seconds_count{phase="decode"}'] < decoded - accepted / 2


def test_another_model_drafts(tmp_path, caplog):
    """The same one, which is right nearly always."""
    target, student = save_tiny("llama", tmp_path / "target"), save_tiny("llama", tmp_path / "student")
    requests = [
        {"temperature": 0, "max_tokens": 40, "ignore_eos": True},
        {"temperature": 0.7, "seed": 4, "max_tokens": 20, "n": 2, "ignore_eos": True},
    ]
    text, answers, sizes = TEXT[:80], [], []
    with caplog.at_level("INFO", "longspan"):
        for more in ({}, {"speculate": "draft", "draft_model": str(student)}):
            with (
                serving(model=str(target), weights="float", **more) as server,
                server.client() as client,
            ):
                answers.append([client.generate(text, **request) for request in requests])
                info = client.model_info()
                sizes.append(server.metrics()['longspan_device_memory_bytes{kind="weights"}'])
    assert (info.speculation.method, info.speculation.draft_tokens) == ("draft", 4)
    assert [told(answer) for answer in answers[1]] == [told(answer) for answer in answers[0]]
    usage = answers[1][0].usage
    assert usage.draft_tokens > 0
    assert usage.accepted_draft_tokens > 0
    assert sizes[1] == 2 * sizes[0]
    assert f"drafts are made by {student}: weights float32" in caplog.text
