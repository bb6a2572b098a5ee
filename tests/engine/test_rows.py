"""Models that answer with other rows of logits than they are asked for."""

from functools import partial

import pytest
import torch
from transformers.models.llama import modeling_llama

from server.errors import RefusedError
from server.models.load import load_model
from tests.engine.harness import greedy_requests, load, make_core, run, transformers_next
from tests.models.proving import proven
from tests.models_zoo import save_tiny

PROMPTS = [[7, 8, 9, 10, 11], [20], [5, 6, 7] * 9]


def check(folder):
    proven(load_model(folder, "float32", "cpu", None, lambda *_: None))


@pytest.fixture
def answer(monkeypatch):
    """Changes what ``LlamaForCausalLM`` does with the rows that it is asked for."""
    own = modeling_llama.LlamaForCausalLM.forward

    def change(forward):
        monkeypatch.setattr(
            modeling_llama.LlamaForCausalLM,
            "forward",
            lambda *args, **named: forward(partial(own, *args), named),
        )

    return change


def all_rows(own, named):
    named.pop("logits_to_keep", None)
    return own(**named)


def last_row(own, named):
    return own(**{**named, "logits_to_keep": 1})


def wrong_rows(own, named):
    keep = named.get("logits_to_keep")
    return own(**(named if keep is None else {**named, "logits_to_keep": keep - 1}))


@pytest.mark.parametrize("page_size", [4, 16])
def test_a_model_that_gives_all_rows_is_served_right(page_size, tmp_path, answer):
    folder = save_tiny("llama", tmp_path)
    answer(all_rows)
    check(folder)
    loaded = load(folder)
    core = make_core(loaded, page_size=page_size, pages=64, max_running=4, max_batch_tokens=8)
    tokens = [outcome.tokens for outcome in run(core, greedy_requests(PROMPTS, 9)).values()]
    assert [len(output) for output in tokens] == [9, 9, 9]
    assert transformers_next(folder, PROMPTS, tokens) == tokens


def test_prompt_logprobs_of_such_a_model(tmp_path, answer):
    folder = save_tiny("llama", tmp_path)
    plain = run(
        make_core(load(folder), page_size=4, pages=64), greedy_requests(PROMPTS, 2, prompt_logprobs=0)
    )
    answer(all_rows)
    core = make_core(load(folder), page_size=4, pages=64, max_running=4, max_batch_tokens=8)
    outcomes = run(core, greedy_requests(PROMPTS, 2, prompt_logprobs=0))
    for own, expected in zip(outcomes.values(), plain.values(), strict=True):
        found, right = (
            torch.tensor([each.chosen.logprob for each in outcome.prompt_logprobs])
            for outcome in (own, expected)
        )
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (last_row, r"cannot be served: asked for the logits of 128 of 128 tokens, it gives those of 1"),
        (wrong_rows, r"its logits differ by up to"),
    ],
)
def test_a_model_that_gives_other_rows_is_refused(forward, sentence, tmp_path, answer):
    folder = save_tiny("llama", tmp_path)
    check(folder)
    answer(forward)
    with pytest.raises(RefusedError, match=sentence):
        check(folder)
