"""What a run says of the server's speculation."""

from types import SimpleNamespace

from loadtest.load.reconcile import server_side
from loadtest.load.remarks import _speculated


def test_drafts_are_told_where_there_were_any():
    before = {"longspan_draft_tokens_total": 50.0, "longspan_accepted_draft_tokens_total": 40.0}
    after = {
        "longspan_draft_tokens_total": 250.0,
        "longspan_accepted_draft_tokens_total": 140.0,
        "longspan_generation_tokens_total": 300.0,
    }
    (remark,) = _speculated(SimpleNamespace(server=server_side(before, after)))
    assert remark == "50% of 200 drafts were accepted: 1.50 tokens per step of a sequence"
    assert _speculated(SimpleNamespace(server=server_side(before, before))) == []
    assert _speculated(SimpleNamespace(server=None)) == []
