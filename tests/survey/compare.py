"""Holds what was served to what transformers computes."""

from __future__ import annotations

import torch

from server.messages import FinishReason, PositionLogprob
from tests.engine.harness import Outcome
from tests.survey.oracle import Oracle
from tests.survey.serving import MAX_TOKENS

TOLERANCE = 1e-3
"""The most that a log probability may differ; float32 sums in another order differ by about 1e-5."""


def compare(oracle: Oracle, prompts: list[list[int]], rounds: dict[str, list[Outcome]]) -> tuple[float, str]:
    """The largest difference of a log probability, and where it is."""
    worst, what = 0.0, ""
    expected: dict[tuple[int, ...], torch.Tensor] = {}
    for company, outcomes in rounds.items():
        for prompt, served in zip(prompts, outcomes, strict=True):
            if served.finish is FinishReason.FAILED or len(served.tokens) != MAX_TOKENS:
                return float("inf"), f"no finite logits {company}, prompt of {len(prompt)} tokens"
            text = (*prompt, *served.tokens)
            if text not in expected:
                expected[text] = oracle.logprobs(prompt, served.tokens)
            right = expected[text]
            entries = [*(served.prompt_logprobs or []), *served.logprobs]
            rows = right[len(right) - len(entries) :]
            difference = (_rows(entries, right.shape[1]) - rows).abs().nan_to_num(torch.inf).amax(dim=-1)
            at = int(difference.argmax())
            if float(difference[at]) > worst:
                worst = float(difference[at])
                position = len(right) - len(entries) + at
                what = f"at position {position} of a prompt of {len(prompt)} tokens {company}"
            own = right[len(prompt) - 1 :]
            lost = own.amax(dim=-1) - own.gather(1, torch.tensor(served.tokens)[:, None])[:, 0]
            if not float(lost.max()) <= max(worst, TOLERANCE):
                worst, what = (
                    float(lost.max()),
                    f"greedy tokens of a prompt of {len(prompt)} tokens {company}",
                )
    return worst, what


def rounding(
    oracle: Oracle, sharp: Oracle, prompts: list[list[int]], rounds: dict[str, list[Outcome]]
) -> float:
    """The largest difference between transformers' log probabilities in float32 and in float64."""
    texts = {
        (*prompt, *served.tokens): len(prompt)
        for outcomes in rounds.values()
        for prompt, served in zip(prompts, outcomes, strict=True)
    }
    return max(
        float(
            (oracle.logprobs(list(t[:n]), list(t[n:])) - sharp.logprobs(list(t[:n]), list(t[n:]))).abs().max()
        )
        for t, n in texts.items()
    )


def _rows(entries: list[PositionLogprob], vocabulary: int) -> torch.Tensor:
    rows = torch.full((len(entries), vocabulary), float("nan"))
    for row, entry in zip(rows, entries, strict=True):
        row[[item.token for item in entry.top]] = torch.tensor([item.logprob for item in entry.top])
    return rows


def insensitive(oracle: Oracle, prompt: list[int]) -> str:
    """Why a comparison would prove nothing: logits that hardly show what came before, and in what order."""
    other = [*prompt[-2::-1], prompt[-1]]
    own, swapped = oracle.logprobs(prompt, [0])[-1], oracle.logprobs(other, [0])[-1]
    if float((own - swapped).abs().max()) < 20 * TOLERANCE:
        return "its small model's logits hardly depend on the order of the tokens"
    return ""
