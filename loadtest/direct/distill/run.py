"""A distillation from the operator's words to a Hugging Face folder with its report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from loadtest.direct.distill.acceptance import acceptance
from loadtest.direct.distill.blocks import blocks
from loadtest.direct.distill.report import drawing_of_loss
from loadtest.direct.distill.served import measure
from loadtest.direct.distill.student import dropouts, freeze_vocabulary, make_student, weights_of
from loadtest.direct.distill.train import train
from loadtest.direct.distill.types import Distillation, Listener, Recipe
from loadtest.direct.settings import read_settings
from loadtest.document import plain, write
from loadtest.servers import NotStartedError
from longspan import LongspanError
from server.errors import RefusedError
from server.models.resolve import resolve_model

_RECIPE, _REPORT, _LOSS = "recipe.json", "distillation.json", "loss.svg"
_CHECKPOINTS = "checkpoints"
_EXAMINED_BLOCKS = 24
_SHARE = 8  # of the teacher's layers, one is the student's


def distill(recipe: Recipe, out: Path, cache_dir: Path | None, listener: Listener) -> Distillation:
    """Trains a student, or continues where the same command was interrupted.

    Args:
        recipe: how.
        out: folder that becomes the student's, which transformers and ``longspan serve`` load.
        cache_dir: where converted models are kept; ``None`` for the setting of ``longspan serve``.
        listener: told of progress.

    Raises:
        OSError: a file can't be read or written.
        ValueError: the folder has another run, or is not empty; there is no such teacher; or the recipe does
            not fit it or the text. Says what to change.
    """
    asked = _continued(recipe, out)
    disable_progress_bar()  # of files that are read and written
    cache_dir = cache_dir or read_settings(()).cache_dir
    try:
        files = resolve_model(recipe.teacher or None, cache_dir, lambda stage, _: listener(stage, 0, 0))
    except RefusedError as error:
        raise ValueError(str(error).replace("--model", "--teacher")) from error
    _require_decoder(files.folder)
    if files.tokenizer is None:
        raise ValueError("the teacher has no tokenizer, which its text needs; give a folder that has one")
    listener("loading the teacher", 0, 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer)
    text, held_out = blocks(tokenizer, recipe.text, recipe.context)
    examined = held_out[:_EXAMINED_BLOCKS].to(device)
    layers = recipe.layers or max(1, teacher.config.num_hidden_layers // _SHARE)
    recipe = dataclasses.replace(recipe, layers=layers)
    student: Any = make_student(teacher, layers).to(device)
    listener("acceptance before training", 0, 0)
    before = acceptance(teacher, student, examined)
    undropped = _drop(student, recipe.dropout)
    freeze_vocabulary(student)
    out.mkdir(parents=True, exist_ok=True)
    write(asked, out / _RECIPE)
    began = time.monotonic()
    try:
        losses = train(teacher, student, recipe, text, held_out, out / _CHECKPOINTS, listener)
        seconds = time.monotonic() - began
        for name, was in undropped.items():
            setattr(student.config, name, was)
        student.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except (SafetensorError, RuntimeError) as error:
        if "os error" in str(error) or "PytorchStreamWriter" in str(error):  # how both tell a full disk
            raise OSError(str(error).splitlines()[0]) from error
        raise
    listener("acceptance after training", 0, 0)
    # The folder's own: that of training computes in bfloat16, by accelerate.
    student = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
    after = acceptance(teacher, student, examined)
    found = Distillation(
        recipe, files.name, weights_of(student), weights_of(teacher), before, after, losses, seconds
    )
    drawing_of_loss(losses).write(out / _LOSS)
    write(json.dumps(plain(found), indent=1), out / _REPORT)
    shutil.rmtree(out / _CHECKPOINTS, ignore_errors=True)
    return found


def measure_served(
    found: Distillation, out: Path, cache_dir: Path | None, listener: Listener
) -> Distillation:
    """The same with the figures of the pair as it is served, which the report's file then has too.

    Args:
        found: by ``distill``.
        out: the student's folder.
        cache_dir: as of ``distill``.
        listener: told of progress.

    Raises:
        OSError: the report can't be written.
        ValueError: the teacher or the text is there no more.
    """
    cache_dir = cache_dir or read_settings(()).cache_dir
    recipe = found.recipe
    files = resolve_model(recipe.teacher or None, cache_dir, lambda stage, _: listener(stage, 0, 0))
    tokenizer = AutoTokenizer.from_pretrained(out)
    held_out = blocks(tokenizer, recipe.text, recipe.context)[1]
    try:
        served = measure(recipe.teacher, files.folder, out, held_out, cache_dir, listener)
        found = dataclasses.replace(found, served=served)
    except (NotStartedError, LongspanError) as error:
        found = dataclasses.replace(found, unserved=str(error))
    write(json.dumps(plain(found), indent=1), out / _REPORT)
    return found


def _continued(recipe: Recipe, out: Path) -> str:
    """The recipe as its file has it, after a look at the folder; nothing is written there yet.

    Raises:
        ValueError: it has another run, or files of something else.
    """
    asked, file = json.dumps(plain(recipe), indent=1), out / _RECIPE
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a new folder as --out")
    if (out / _REPORT).exists():
        raise ValueError(f"{out} has a finished student; give a new folder as --out")
    if file.exists():
        if file.read_text() != asked:
            raise ValueError(f"{out} has a run with other options; give another --out, or delete it")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder as --out")
    return asked


def _require_decoder(folder: Path) -> None:
    """Refuses an encoder or encoder-decoder, to which ``AutoModelForCausalLM`` gives a head at random.

    Raises:
        ValueError: the folder's model is no decoder.
    """
    found = AutoConfig.from_pretrained(folder).architectures or ["model without a head"]
    if not set(found) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise ValueError(f"the teacher is a {found[0]}, and no decoder; give one that generates as --teacher")


def _drop(student: nn.Module, probability: float) -> dict[str, float]:
    """Sets dropout in all places that the architecture has; returns what they were."""
    config: Any = student.config
    found = dropouts(config)
    if probability and not found:
        raise ValueError(f"{type(student).__name__} has no dropout; give --dropout 0")
    for name in found:
        setattr(config, name, probability)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in found:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
    return found
