"""Rotary position embeddings: a config's, and the operator's in their place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.errors import RefusedError

# For each kind of scaling, the options that it needs and those that it may have.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("rope_theta",)),
    "linear": (("factor",), ("original_max_position_embeddings", "rope_theta")),
    "dynamic": (("factor",), ("original_max_position_embeddings", "rope_theta")),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "rope_theta",
        ),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings", "rope_theta"),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor", "rope_theta"),
    ),
}
_LISTS = ("short_factor", "long_factor")
_ORIGINAL = "original_max_position_embeddings"
# A config's values of its own scaling, which another kind must not inherit.
_OF_SCALING = {name for needed, others in _KINDS.values() for name in (*needed, *others)} - {"rope_theta"}
_OF_SCALING |= {"rope_type", "type", "truncate"}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The values of ``--rope-scaling`` and ``--rope-option``.

    Attributes:
        kind: a name of transformers' ``rope_type``.
        values: the options, as transformers names them.
    """

    kind: str
    values: dict[str, Any] = field(default_factory=dict)


def read_scaling(kind: str | None, options: Mapping[str, str]) -> RopeScaling | None:
    """The operator's choice; ``None`` for the model's own.

    Raises:
        RefusedError: options are missing, unknown, or not of the right form.
    """
    if kind is None:
        if options:
            raise RefusedError(
                f"--rope-option {next(iter(options))} is a detail of --rope-scaling; choose that too: "
                f"{', '.join(_KINDS)}"
            )
        return None
    needed, others = _KINDS[kind]
    for name in options:
        if name not in (*needed, *others):
            raise RefusedError(
                f"--rope-scaling {kind} has no option {name!r}; "
                f"its options are {', '.join((*needed, *others))}"
            )
    if missing := [name for name in needed if name not in options]:
        raise RefusedError(
            f"--rope-scaling {kind} needs {' and '.join(missing)}: add "
            + " ".join(f"--rope-option {name}=..." for name in missing)
        )
    values = {name: _value(name, text) for name, text in options.items()}
    low, high = values.get("low_freq_factor", 0.0), values.get("high_freq_factor", 1.0)
    if high <= low:
        raise RefusedError(
            f"--rope-option high_freq_factor={high:g} must be more than low_freq_factor={low:g}"
        )
    fast, slow = values.get("beta_fast", 32.0), values.get("beta_slow", 1.0)
    if fast <= slow:
        raise RefusedError(f"--rope-option beta_fast={fast:g} must be more than beta_slow={slow:g}")
    return RopeScaling(kind, values)


def apply_scaling(config: Any, scaling: RopeScaling) -> int:
    """Writes the operator's choice into a config, for transformers to build the model from.

    Where layers of several types rotate differently, those with full attention get it: the others see no
    farther than their window.

    Args:
        config: of the model; a multimodal model's text part is changed.
        scaling: what to write.

    Returns:
        The context length that it is made for.

    Raises:
        RefusedError: the model can't have it.
    """
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        raise RefusedError(
            f"--rope-scaling {scaling.kind}: {text.model_type} has no rotary embedding to change; "
            "leave it out"
        )
    nested = all(isinstance(value, dict | None) for value in parameters.values())
    if nested and not isinstance(parameters.get("full_attention"), dict):
        raise RefusedError(
            f"--rope-scaling {scaling.kind}: {text.model_type} has rotary embeddings for "
            f"{', '.join(parameters)} layers, and which one is meant can't be told; leave it out"
        )
    own = parameters["full_attention"] if nested else parameters
    longest = getattr(text, "max_position_embeddings", None) or 0
    said = scaling.values.get(_ORIGINAL), getattr(text, _ORIGINAL, None), own.get(_ORIGINAL), longest
    original = next(filter(None, said), None)
    if original is None:
        raise RefusedError(
            f"--rope-scaling {scaling.kind}: the config doesn't say for how many positions the model was "
            f"trained; say it: --rope-option {_ORIGINAL}=N"
        )
    written = {name: value for name, value in own.items() if name not in _OF_SCALING}
    written |= {**scaling.values, "rope_type": scaling.kind}
    for name in _LISTS:
        _check_count(name, written, text)
    factor = written.get("factor", 1.0)
    if scaling.kind == "longrope" and "factor" not in written:
        factor = written["factor"] = longest / original
        if factor <= 1:
            raise RefusedError(
                f"--rope-scaling longrope needs to know how far it stretches the {original} positions that "
                "the model was trained for: add --rope-option factor=..."
            )
    if scaling.kind in ("yarn", "llama3", "longrope"):
        written[_ORIGINAL] = original
        if hasattr(text, _ORIGINAL):  # where it is, transformers prefers it
            setattr(text, _ORIGINAL, original)
    else:
        written.pop(_ORIGINAL, None)
    length = int(original * factor)
    # For dynamic scaling, the length from which on transformers' formula stretches.
    text.max_position_embeddings = original if scaling.kind == "dynamic" else length
    text.rope_parameters = {**parameters, "full_attention": written} if nested else written
    try:
        text.standardize_rope_params()
        text.validate_rope()
    except Exception as error:
        raise RefusedError(
            f"--rope-scaling {scaling.kind} doesn't go with {text.model_type}: {error}; leave it out"
        ) from error
    return length


def check_scaling(model: Any, scaling: RopeScaling) -> None:
    """Checks that a loaded model rotates as it was told.

    Raises:
        RefusedError: none of its rotary embeddings is of this kind.
    """
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    if not any(scaling.kind in (kind.values() if isinstance(kind, dict) else (kind,)) for kind in kinds):
        raise RefusedError(
            f"--rope-scaling {scaling.kind}: {type(model).__name__} does not read it from its config; "
            "leave it out"
        )


def ropes(config: Any, *, far: bool = False) -> Iterator[dict[str, Any]]:
    """The parameters of every rotary embedding: some models have one, some one per type of layer.

    Args:
        config: of the model.
        far: only of layers that see all of the context, where the others have parameters of their own.
    """
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        else:
            names = ["full_attention"] if far and parameters.get("full_attention") else list(parameters)
            nested = (parameters[name] for name in names)
            yield from (each for each in nested if isinstance(each, dict) and "rope_type" in each)


def _value(name: str, text: str) -> Any:
    if name in _LISTS:
        return [_number(name, part.strip()) for part in text.split(",")]
    value = _number(name, text)
    if name == _ORIGINAL:
        if value != int(value):
            raise RefusedError(f"--rope-option {name}={text}: must be a whole number of tokens")
        return int(value)
    if name == "factor" and value < 1:
        raise RefusedError(f"--rope-option factor={text}: must be at least 1, since it stretches positions")
    return value


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        kind = "numbers above 0 with commas between" if name in _LISTS else "a number above 0"
        raise RefusedError(f"--rope-option {name}: {text!r} is not {kind}")
    return value


def _check_count(name: str, values: Mapping[str, Any], text: Any) -> None:
    """LongRoPE has a factor for every pair of numbers that is rotated."""
    if name not in values:
        return
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = int(head * values.get("partial_rotary_factor", 1.0)) // 2
    if len(values[name]) != pairs:
        raise RefusedError(
            f"--rope-option {name} has {len(values[name])} numbers, but the model rotates {pairs} pairs; "
            "give one number for each"
        )
