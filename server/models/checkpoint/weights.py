"""Compares what a checkpoint's files hold with what transformers made of it.

transformers drops tensors that a model has no place for, some silently, and takes one of two that have
the same place. Here each tensor of the files was taken, or is known to be unused, or refuses the model.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from server.errors import RefusedError
from server.models.checkpoint.files import Stored
from server.models.checkpoint.quantization_parts import looks_quantized, of_activations
from server.models.checkpoint.reading import Reading
from server.models.checkpoint.unused import layer_beyond, reason_unused

log = logging.getLogger("longspan.models")

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of plain weights, as safetensors spells them."""
_ADAPTER = re.compile(r"\.lora_|\.base_layer\.|\.modules_to_save\.")
_HEAD = re.compile(
    r"(?:^|\.)(?:score|v_head|value_head|classifier|classification_head|reward_head|rm_head|regression_layer"
    r"|qa_outputs|embedding_head)(?:\.|$)"
)
_OUTPUT = re.compile(r"^lm_head\.(?:weight|bias)$")
# Tensors that some classes of transformers declare optional; others begin with zeros where they are missing.
_OPTIONAL = {
    "e_score_correction_bias": "experts are chosen without a correction",
    "final_logits_bias": "nothing is added to the logits",
}
# Sinusoidal ones, which some classes compute and leave out of their files, as they declare.
_COMPUTED = ".embed_positions.weight"


def check_made(reading: Reading, folder: Path) -> None:
    """Refuses a checkpoint whose tensors transformers could not convert to a weight; its report is not shown.

    Raises:
        RefusedError: names the weight, and why.
    """
    for name, failure in reading.failures.items():
        raise RefusedError(
            f"{name} can't be made of the weights in {folder}: {_last_line(failure)}; "
            "choose a complete checkpoint of a causal language model"
        )


def check_read(
    model: Any, reading: Reading, stored: Mapping[str, Stored], folder: Path, method: str | None
) -> None:
    """Refuses a model that is not the whole of its files.

    Args:
        model: as transformers loaded it.
        reading: what was noted meanwhile.
        stored: what the files hold.
        folder: where they lie.
        method: how the weights are quantized, if they are.

    Raises:
        RefusedError: a tensor has no place, a place has no tensor, or two have the same; by name.
    """
    if other := sorted(stored.keys() ^ reading.targets.keys()):
        raise RefusedError(
            f"transformers read other tensors than {folder} holds, {other[0]} among them; "
            "fetch the model again"
        )
    unread = sorted(stored.keys() - reading.taken)
    _check_kind(model, unread, folder)
    reasons: dict[str, list[str]] = defaultdict(list)
    unknown = []
    for name in unread:
        target = reading.targets[name]
        dropped = target not in reading.told
        if method is not None and of_activations(name):
            reasons["activations are not rounded"].append(name)
            continue
        if _OUTPUT.search(name) and model.get_output_embeddings() is None:
            reasons["embeddings do without the output layer"].append(name)
            continue
        reason = next(
            (
                reason
                for spelled in (name, target)
                if (reason := reason_unused(spelled, stored[name], model.config, dropped=dropped))
            ),
            None,
        )
        if reason:
            reasons[reason].append(name)
        else:
            unknown.append(name)
    _check_unknown(model, unknown, stored, folder, method)
    _check_whole(model, reading, unknown, folder)
    _check_single(reading, folder)
    if method is None:
        _check_dtypes(model, reading, stored, folder)
    _tell_untied(model)
    for reason, names in reasons.items():
        log.info("weights not used: %d, %s among them: %s", len(names), names[0], reason)


def _check_kind(model: Any, unread: list[str], folder: Path) -> None:
    """Refuses tensors whose names say what the checkpoint is instead."""
    if adapter := [name for name in unread if _ADAPTER.search(name)]:
        raise RefusedError(
            f"{folder} holds an adapter that is not merged ({adapter[0]}, {len(adapter)} in all); "
            "merge it into its base model first"
        )
    heads = [name for name in unread if _HEAD.search(name) and not reason_unused(name, None, model.config)]
    if heads:
        raise RefusedError(
            f"{folder} is a reward or classification model: its head {heads[0]} has no place in "
            f"{type(model).__name__}; "
            + ("Longspan serves language models" if _generates(model) else "choose a model without it")
        )


def _check_unknown(
    model: Any, unknown: list[str], stored: Mapping[str, Stored], folder: Path, method: str | None
) -> None:
    if scales := [name for name in unknown if looks_quantized(name)]:
        raise RefusedError(
            f"the weights in {folder} are quantized: {len(scales)} tensors belong to that, {scales[0]} among "
            "them, but "
            + (
                f"quantization method {method} as transformers reads it has no place for them"
                if method
                else "its config says nothing of it, and without them the weights are wrong"
            )
            + "; choose the unquantized checkpoint, or fetch this one again with its complete config.json"
        )
    beyond = {layer for name in unknown if (layer := layer_beyond(name, model.config)) is not None}
    if beyond:
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        raise RefusedError(
            f"the weights in {folder} have {max(beyond) + 1} layers, but its config only {count} "
            "(num_hidden_layers); fetch the config.json that belongs to them"
        )


def _check_whole(model: Any, reading: Reading, unknown: list[str], folder: Path) -> None:
    missing = sorted(name for name in reading.missing if not _may_miss(name, model))
    wrong = []
    if missing:
        wrong.append(f"{_count(missing)} missing, {missing[0]} among them")
    if reading.mismatched:
        wrong.append(mismatches(reading.mismatched))
    if unknown:
        wrong.append(f"{_count(unknown)} not part of it, {unknown[0]} among them")
    if wrong:
        raise RefusedError(not_those(model, wrong, folder))
    if bare := sorted(name for name, weight in model.state_dict().items() if weight.is_meta):
        raise RefusedError(
            f"the weights of {type(model).__name__} were not all loaded: {_count(bare)} not, {bare[0]} among "
            "them; choose another model"
        )


def _may_miss(name: str, model: Any) -> bool:
    said = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    optional = any(end in said and name.endswith(end) for end in _OPTIONAL)
    optional = optional or (name in said and name.endswith(_COMPUTED))
    return optional or bool(reason_unused(name, None, model.config))


def _check_single(reading: Reading, folder: Path) -> None:
    """Of two tensors for the same place, transformers silently takes one."""
    places: dict[str, str] = {}
    for name in sorted(reading.taken):
        target = reading.targets[name]
        other = places.setdefault(target, name)
        if other != name and not {name, other} <= reading.converted:
            raise RefusedError(
                f"{other} and {name} in {folder} are both {target}, and which is meant can't be told; "
                "fetch the model again"
            )


def _tell_untied(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    if tied and head is not None and getattr(head, "weight", None) is not embedding.weight:
        log.warning(
            "the config says that the output layer is the embedding (tie_word_embeddings), but the weights "
            "hold another one, which is used as transformers does"
        )


def mismatches(shapes: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    """Tensors of another shape, in words: name, shape in the file, shape by the config; empty without any."""
    if not shapes:
        return ""
    name, file_shape, own_shape = shapes[0]
    return (
        f"{len(shapes)} {'has' if len(shapes) == 1 else 'have'} another shape, "
        f"{name} among them: {list(file_shape)} in the file, {list(own_shape)} by the config"
    )


def not_those(model: Any, wrong: Sequence[str], folder: Path) -> str:
    """The sentence about weights that are not the model's."""
    wanted = "causal language model" if _generates(model) else type(model).__name__
    return (
        f"the weights in {folder} are not those of {type(model).__name__}: {'; '.join(wrong)}; "
        f"choose a complete checkpoint of a {wanted}"
    )


def _generates(model: Any) -> bool:
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _check_dtypes(model: Any, reading: Reading, stored: Mapping[str, Stored], folder: Path) -> None:
    places = model.state_dict()
    integers = [
        name
        for name in sorted(reading.taken)
        if stored[name].dtype not in FLOATS and places[reading.targets[name]].is_floating_point()
    ]
    check_floats(integers, stored, folder, None)


def check_floats(
    integers: Sequence[str], stored: Mapping[str, Stored], folder: Path, method: str | None
) -> None:
    """Refuses weights that are no floats.

    Args:
        integers: their names; may be empty.
        stored: what the files hold.
        folder: where they lie.
        method: how the others are quantized, if they are.

    Raises:
        RefusedError: there are some.
    """
    if integers:
        why = f"{method} does not quantize them so" if method else "its config names no quantization"
        raise RefusedError(
            f"{len(integers)} weights in {folder} are not in floating point: {integers[0]} is "
            f"{stored[integers[0]].dtype}, but {why}; choose the unquantized checkpoint, or fetch this one "
            "again with its complete config.json"
        )


def check_finite(model: Any, stored: Mapping[str, Stored], folder: Path) -> None:
    """Refuses weights that hold NaN or infinity, which would spread to every result computed with them.

    Raises:
        RefusedError: some do; the sentence names the first and counts them.
    """
    seen: set[int] = set()
    broken: list[tuple[str, int]] = []
    for name, weight in model.state_dict().items():
        if not weight.is_floating_point() or weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        # A sum is NaN or infinite if any part is, and needs no memory; only then are they counted.
        if not weight.sum(dtype=torch.float32).isfinite() and (count := _non_finite(weight)):
            broken.append((name, count))
    if not broken:
        return
    name, count = broken[0]
    was_cast = model.dtype == torch.float16 and any(tensor.dtype != "F16" for tensor in stored.values())
    raise RefusedError(
        f"{name} in {folder} has {count} non-finite numbers (NaN or infinite)"
        + (f", and {len(broken) - 1} other weights have some" if len(broken) > 1 else "")
        + (
            "; choose --dtype bfloat16 or float32, whose range is larger"
            if was_cast
            else "; fetch the model again"
        )
    )


def _non_finite(weight: torch.Tensor) -> int:
    rows = weight.reshape(-1).split(1 << 24)
    return sum(int((~row.isfinite()).sum()) for row in rows)


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} {'is' if len(names) == 1 else 'are'}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "it fails"
