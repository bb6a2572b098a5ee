"""A GGUF file to a Hugging Face folder, without loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from server.models.checkpoint.outline import outline
from server.models.conversions import arguments, writing
from server.models.gguf.config import read_config
from server.models.gguf.file import GgufFile
from server.models.gguf.generation import generation_config
from server.models.gguf.ignored import refuse_unused
from server.models.gguf.parameters import Parameter, plan_parameters
from server.models.gguf.reading import Reading
from server.models.gguf.table import find_row
from server.models.gguf.tokenizer import read_tokenizer
from server.models.gguf.transforms import minus_one
from server.models.gguf.values import check_values
from server.models.gguf.writing import write_weights


def convert(file: Path, folder: Path) -> None:
    """Writes config, weights, tokenizer and chat template.

    Weights keep their exact values: quantized ones are stored as float32, since ``scale * q + offset`` has
    no shorter form; 16-bit ones as they are, where the file's float32 tensors lose nothing by it.

    Args:
        file: a GGUF file of a causal language model, or any part of a split set.
        folder: where to write; made if missing.

    Raises:
        ValueError: the file can't be converted; the message says why.
    """
    _say("reading", 0.0)
    source = GgufFile(file)
    reading = Reading(source)
    check_values(source, reading.architecture)
    row = find_row(reading)
    generation = generation_config(source.metadata)
    described = read_config(reading, row, generation)
    model = outline(transformers.AutoModelForCausalLM, described.config, sum(1 for _ in source))
    plan = plan_parameters(source, row, described.sizes, model)
    _say("tokenizer", 0.1)
    tokenizer = read_tokenizer(source.path, source.metadata)
    layers = described.config.num_hidden_layers
    refuse_unused(source, reading.architecture, row.unused, layers, described.drafting)
    with writing():
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
        _write_config(folder, model, _exact_dtype(source, plan))
        write_weights(folder, model, source, plan, lambda done: _say("writing", 0.2 + 0.8 * done))


def _write_config(folder: Path, model: Any, dtype: torch.dtype) -> None:
    config = model.config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _say(stage: str, fraction: float) -> None:
    print(round(fraction, 3), stage, flush=True)


def _exact_dtype(file: GgufFile, plan: list[Parameter]) -> torch.dtype:
    """The shortest dtype that holds every weight exactly."""
    kinds = {name: file.kind(name) for name in file.claimed()}
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        if set(kinds.values()) <= {kind, "F32"} and all(
            torch.equal(weight.to(dtype).float(), weight)
            for parameter in plan
            if parameter.kinds(file) != {kind} or parameter.transform is minus_one
            for weight in (parameter.compute(file),)
        ):
            return dtype
    return torch.float32


def main() -> None:
    """The program."""
    source, target = arguments()
    transformers.logging.disable_progress_bar()
    try:
        convert(source, target)
    except ValueError as error:
        sys.exit(" ".join(str(error).split()))
    except Exception as error:  # a file can contradict itself in more ways than are looked for
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        sys.exit(f"what it says does not make a model ({reason})")
