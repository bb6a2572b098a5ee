"""A file's rotary position embeddings, as transformers' rope parameters."""

from __future__ import annotations

import math
from typing import Any

import torch

from server.errors import quoted
from server.models.gguf.llama3 import recover_llama3
from server.models.gguf.reading import Reading

_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_YARN_MIXES = tuple(
    f"rope.scaling.yarn_{key}" for key in ("beta_fast", "beta_slow", "ext_factor", "log_multiplier")
)
# The values that files without the key mean.
_BASE = 10000.0


def read_rope(
    reading: Reading, head_size: int, context: int, *, partial: bool = False, truncate: bool = True
) -> dict[str, Any]:
    """Base, scaling and rotated share of the layers that see the whole text.

    Args:
        reading: the file's metadata.
        head_size: numbers per head.
        context: how long the file says that its context is.
        partial: the architecture can leave a part of each head unrotated.
        truncate: yarn's bounds are whole numbers of frequencies.

    Raises:
        ValueError: it is something that transformers can't compute, or the file contradicts itself.
    """
    base = float(reading.get("rope.freq_base", _BASE))
    rotated = reading.get("rope.dimension_count", head_size)
    reading.expect("rope.dimension_count_swa", rotated)
    parameters = _scaling(reading, base, rotated, context)
    if parameters["rope_type"] == "yarn" and not truncate:
        parameters["truncate"] = False
    if partial:
        parameters["partial_rotary_factor"] = _share(rotated, head_size)
    elif rotated != head_size:
        raise ValueError(
            f"it rotates {rotated} of {head_size} numbers per head, which {reading.architecture} models of "
            "transformers can't"
        )
    return {**parameters, "rope_theta": base}


def _scaling(reading: Reading, base: float, rotated: int, context: int) -> dict[str, Any]:
    kind = reading.get("rope.scaling.type", "linear")
    old_factor = reading.get("rope.scale_linear", None)
    factor = float(reading.get("rope.scaling.factor", old_factor) or 1.0)
    original = reading.get("rope.scaling.original_context_length", context)
    # The first multiplies the attention factor of the kind of scaling; the second is yarn's own.
    more = float(reading.get("rope.scaling.attn_factor", 1.0))
    file = reading.file
    if _LONG in file or _SHORT in file or kind == "longrope":
        if factor != 1.0:
            raise ValueError("it has both longrope factors and another scaling of positions")
        return {
            "rope_type": "longrope",
            "long_factor": _factors(reading, _LONG, rotated).tolist(),
            "short_factor": _factors(reading, _SHORT, rotated).tolist(),
            "attention_factor": more,
            "original_max_position_embeddings": original,
        }
    if kind == "yarn" and factor != 1.0:
        parameters = _yarn(reading, factor, more) | {"original_max_position_embeddings": original}
    elif more != 1.0:
        raise ValueError(
            f"it scales attention by {more:g} ({reading.architecture}.rope.scaling.attn_factor) without "
            "yarn or longrope, which transformers can't"
        )
    elif kind in ("none", "linear", "yarn"):
        linear = kind == "linear" and factor != 1.0
        # How yarn mixes its frequencies changes nothing where they are all the same.
        for key in _YARN_MIXES if factor == 1.0 else ():
            reading.get(key, None)
        parameters = {"rope_type": "linear", "factor": factor} if linear else {"rope_type": "default"}
    else:
        raise ValueError(f"its scaling of positions, {quoted(kind)}, is unknown to Longspan")
    if _FREQUENCIES not in file:
        return parameters
    if parameters["rope_type"] != "default":
        raise ValueError(f"it has both {_FREQUENCIES} and another scaling of positions")
    return _frequencies(_factors(reading, _FREQUENCIES, rotated), base, context)


def _yarn(reading: Reading, factor: float, more: float) -> dict[str, Any]:
    extrapolated = reading.get("rope.scaling.yarn_ext_factor", -1.0)
    if extrapolated >= 0 and extrapolated != 1.0:
        raise ValueError(
            f"{reading.architecture}.rope.scaling.yarn_ext_factor is {extrapolated:g}, but transformers "
            "computes yarn with 1"
        )
    parameters = {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": float(reading.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(reading.get("rope.scaling.yarn_beta_slow", 1.0)),
    }
    own = reading.get("rope.scaling.yarn_attn_factor", None)
    share = reading.get("rope.scaling.yarn_log_multiplier", None)
    if own is None:
        own = 0.1 * math.log(factor) + 1.0
        own /= 0.1 * share * math.log(factor) + 1.0 if share else 1.0
    return parameters | {"attention_factor": own * more}


def _factors(reading: Reading, name: str, rotated: int) -> torch.Tensor:
    factors = reading.file.take(name)
    if factors.numel() != rotated // 2:
        raise ValueError(f"{name} has {factors.numel()} numbers instead of {rotated // 2}")
    if not bool(((factors > 0) & factors.isfinite()).all()):
        raise ValueError(f"{name} divides positions by numbers that are not above 0 or not finite")
    return factors.flatten()


def _frequencies(factors: torch.Tensor, base: float, context: int) -> dict[str, Any]:
    """The frequencies' divisors: llama3's where they are that, else longrope's with one set of factors."""
    if bool((factors == 1).all()):
        return {"rope_type": "default"}
    parameters = recover_llama3(factors, base)
    if parameters is None:
        numbers = factors.tolist()
        parameters = {
            "rope_type": "longrope",
            "long_factor": numbers,
            "short_factor": numbers,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    return parameters


def _share(rotated: int, head_size: int) -> float:
    """The share that transformers turns back into exactly ``rotated``, by rounding down."""
    share = rotated / head_size
    return share if int(head_size * share) == rotated else math.nextafter(share, 2.0)
