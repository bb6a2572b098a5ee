"""The lengths beyond which a config changes what a model computes: windows, chunks, original contexts."""

from __future__ import annotations

import json
import re
from typing import Any

_NAMES = re.compile(
    r"\w*window(_size)?|\w*window_len|\w*chunk_size|\w*chunk_length|original_max_position_embeddings"
    r"|floor_scale|log_scaling_n_floor|index_topk|\w*max_distance|rel_extent|\w*block_size|local_attention"
    r"|attention_window\w*|n_window\w*"
)


def thresholds(config: Any) -> dict[str, int]:
    """By the attribute's name, of the part of the config that describes the decoder."""
    found: dict[str, int] = {}
    text = config.get_text_config(decoder=True)
    _collect(text.to_dict(), found)
    ropes = json.dumps(getattr(text, "rope_parameters", None))
    if '"rope_type": "dynamic"' in ropes and '"alpha"' not in ropes:  # with alpha it depends on no length
        found["max_position_embeddings"] = text.max_position_embeddings
    return dict(sorted(found.items()))


def _collect(values: dict[str, Any], found: dict[str, int]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _collect(value, found)
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value > 1
            and _NAMES.fullmatch(str(name))
        ):
            found[str(name)] = max(value, found.get(str(name), 0))
