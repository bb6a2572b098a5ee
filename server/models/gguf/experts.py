"""Mixtures of experts, as files describe them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.gguf.reading import Reading
from server.models.gguf.row import Rule
from server.models.gguf.transforms import side_by_side

EXPERTS: Mapping[str, str | Rule] = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": Rule(("ffn_gate_exps.weight", "ffn_up_exps.weight"), side_by_side),
    "mlp.experts.down_proj": Rule(("ffn_down_exps.weight",)),
}
_SOFTMAX = 1


def count_experts(reading: Reading) -> tuple[int, int]:
    """How many there are, and how many of them see a token.

    Raises:
        ValueError: they are not said, or can't be.
    """
    count, used = reading.get("expert_count"), reading.get("expert_used_count")
    if not 1 <= used <= count:
        raise ValueError(f"it says that a token is seen by {used} of {count} experts")
    return count, used


def read_experts(reading: Reading, count: str, *, normalized: bool | None = None) -> dict[str, Any]:
    """How many there are, and how they are chosen.

    Args:
        reading: the file's metadata.
        count: the config's name for their number.
        normalized: whether the weights of the chosen ones add up to one, where the file does not say it;
            ``None`` where the config has no choice.

    Raises:
        ValueError: they are chosen or weighted in a way that the architecture does not have.
    """
    reading.expect("expert_gating_func", _SOFTMAX)
    for key in ("expert_group_count", "expert_group_used_count"):
        if reading.get(key, 0) not in (0, 1):
            raise ValueError(
                f"{reading.architecture}.{key} is {reading.get(key)}; Longspan reads no groups of experts"
            )
    if reading.get("expert_weights_scale", 1.0) not in (0.0, 1.0):
        reading.expect("expert_weights_scale", 1.0)
    values: dict[str, Any] = dict(zip((count, "num_experts_per_tok"), count_experts(reading), strict=True))
    if normalized is None:
        reading.expect("expert_weights_norm", True)
        return values
    return values | {"norm_topk_prob": bool(reading.get("expert_weights_norm", normalized))}
