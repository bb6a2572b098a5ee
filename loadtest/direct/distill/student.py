"""A student made of some of the teacher's layers."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

_DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "dropout",
    "hidden_dropout",
    "activation_dropout",
    "resid_dropout",
    "embedding_dropout",
    "ffn_dropout",
)


def make_student(teacher: nn.Module, layers: int) -> nn.Module:
    """A model of the teacher's architecture and vocabulary, with some of its layers.

    The layers are spread evenly over the teacher's, first and last included (DistilBERT takes every other
    one: Sanh et al. 2019, section 3). Embeddings, output layer and all else outside of the layers are the
    teacher's.

    Args:
        teacher: a decoder of transformers.
        layers: of the student, at least 1 and fewer than the teacher has.

    Raises:
        ValueError: the number of layers is not possible, or the architecture's layers aren't all of one list.
    """
    config: Any = copy.deepcopy(teacher.config)
    whole = config.num_hidden_layers
    if not 1 <= layers < whole:
        raise ValueError(f"--layers {layers}: the teacher has {whole}; give 1 to {whole - 1}")
    taken = [round(index * (whole - 1) / max(1, layers - 1)) for index in range(layers)]
    config.num_hidden_layers = layers
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == whole:  # one entry for each
            setattr(config, name, [value[index] for index in taken])
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = _layers_path(teacher, whole)
    place = {old: new for new, old in enumerate(taken)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        inside = re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.*)", name)
        if inside is None:
            state[name] = tensor
        elif (old := int(inside[1])) in place:
            state[f"{path}.{place[old]}.{inside[2]}"] = tensor
    student.load_state_dict(state)  # strictly: each tensor has its place, and no other is left
    return student


def freeze_vocabulary(student: nn.Module) -> None:
    """Keeps the teacher's embeddings and output layer, as EAGLE does (Li et al. 2024, section 3.1).

    They are most of a small student's weights, and little text has few of the vocabulary's words.
    """
    model: Any = student
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for weight in module.parameters():
            weight.requires_grad = False


def dropouts(config: Any) -> dict[str, float]:
    """The dropout probabilities that an architecture has, by their names in its config."""
    return {
        name: getattr(config, name) for name in _DROPOUTS if isinstance(getattr(config, name, None), float)
    }


def weights_of(model: nn.Module) -> int:
    """How many weights a model has; tied ones count once."""
    return sum(weight.numel() for weight in model.parameters())


def _layers_path(teacher: nn.Module, layers: int) -> str:
    lists = [
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    if len(lists) != 1:
        raise ValueError(
            f"the teacher has {len(lists)} lists of {layers} layers where one was expected; "
            "take a decoder of the usual form"
        )
    return lists[0]
