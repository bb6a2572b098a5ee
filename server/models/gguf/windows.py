"""The layers that see a window only, as a file says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.models.gguf.reading import Reading


@dataclass(frozen=True, slots=True)
class Window:
    """How an architecture uses windows.

    Attributes:
        period: of so many layers, the last sees the whole text; 0 if none does.
        by_layer: transformers' config says it layer by layer; else all layers are alike.
        default: tokens, where the file does not say it; 0 for no window.
    """

    period: int = 0
    by_layer: bool = False
    default: int = 0


def read_window(reading: Reading, window: Window | None, layers: int) -> dict[str, Any]:
    """Values of the config.

    Args:
        reading: the file's metadata.
        window: the architecture's use; ``None`` if it has no windows.
        layers: of the model.

    Raises:
        ValueError: the file says what the architecture can't have.
    """
    if window is None:
        return {}
    size = reading.get("attention.sliding_window", window.default)
    pattern = reading.items("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) < layers:
            raise ValueError("its sliding_window_pattern is shorter than its layers")
        inside = [bool(each) for each in pattern[:layers]]
    else:
        period = window.period if pattern is None else int(pattern)
        inside = [period == 0 or layer % period < period - 1 for layer in range(layers)]
    if not size:
        inside = [False] * layers
    if window.by_layer:
        kinds = ["sliding_attention" if each else "full_attention" for each in inside]
        return {"sliding_window": int(size) if any(inside) else None, "layer_types": kinds}
    if any(inside) and not all(inside):
        raise ValueError(
            f"a part of its layers has a window, but all layers of {reading.architecture} models of "
            "transformers are alike"
        )
    return {"sliding_window": int(size) if any(inside) else None}
