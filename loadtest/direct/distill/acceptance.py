"""How often the teacher would accept what the student drafts, and what that is worth."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import torch
from torch import nn

from loadtest.direct.distill.types import Acceptance
from loadtest.measuring.student import student_quantile

_MOST_DRAFTED = 8


@torch.inference_mode()
def acceptance(teacher: nn.Module, student: nn.Module, held_out: torch.Tensor) -> Acceptance:
    """Acceptance in held-out text, with the text itself before each token.

    Args:
        teacher: gives the distribution that is to be kept.
        student: drafts.
        held_out: token ids ``[blocks, context]``, at least two blocks.
    """
    student.eval()
    sampled, greedy = [], []
    for block in held_out:
        ours, theirs = (
            model(input_ids=block[None]).logits[0].float().softmax(-1) for model in (student, teacher)
        )
        sampled.append(torch.minimum(ours, theirs).sum(-1).mean().item())
        greedy.append((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    half = student_quantile(0.025, len(sampled) - 1) * stdev(sampled) / math.sqrt(len(sampled))
    mean = fmean(sampled)
    return Acceptance(mean, mean - half, mean + half, fmean(greedy), held_out.numel())


def best_speedup(rate: float, cost: float) -> tuple[float, int]:
    """The largest factor by which speculation can speed up decoding, and how many tokens to draft for it.

    ``(1 - rate^(n + 1)) / ((1 - rate) * (n * cost + 1))`` for n drafted tokens (Leviathan et al. 2023,
    theorem 3.8), as if accepting one token told nothing about the next, and verifying n tokens took as long
    as one step.

    Args:
        rate: acceptance, 0 to 1.
        cost: of a student's step, as a share of a teacher's.
    """

    def speedup(drafted: int) -> float:
        tokens = sum(rate**accepted for accepted in range(drafted + 1))
        return tokens / (drafted * cost + 1)

    drafted = max(range(1, _MOST_DRAFTED + 1), key=speedup)
    return speedup(drafted), drafted
