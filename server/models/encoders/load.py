"""Loads an encoder's folder into transformers' own class, with attention handed to Longspan if it can be."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from attention.hook import register
from server.encoder_messages import Task
from server.errors import RefusedError, quoted
from server.models.checkpoint.files import Stored
from server.models.checkpoint.reading import read_stored
from server.models.encoders.by_length import ByLength, reach, reset, settle
from server.models.encoders.encoder import Encoder
from server.models.encoders.flattened import Flattened, first_position, is_causal, position_table
from server.models.encoders.head import Chances, Head, chances
from server.models.encoders.prepacked import prepack
from server.models.encoders.prove import check, check_head, compute_own, proof_texts
from server.models.encoders.recognize import check_embedder, read_tasks
from server.models.encoders.sentence import SentenceFiles, read_sentence_files
from server.models.folder import weight_files
from server.models.json_file import is_unicode
from server.models.limits import check_positions, context_length
from server.models.load import read_model
from server.models.recognize import is_encoder, read_any_config
from server.models.refusing import refusing
from server.panics import without_panics

log = logging.getLogger("longspan.models")

_CLASSES = {
    Task.SCORE: transformers.AutoModelForSequenceClassification,
    Task.FILL: transformers.AutoModelForMaskedLM,
}


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """An encoder that is ready to be served.

    Attributes:
        encoder: computes vectors.
        head: makes logits of them, of labels or of tokens, if there is one.
        architecture: its class in transformers.
        tasks: what it can do.
        parameters: number of weights, tied ones counted once.
        weight_bytes: bytes of these.
        layers: attention layers.
        vocabulary_size: tokens that it knows.
        context_length: tokens of the longest text.
        embedding_size: numbers of a vector.
        files: what the makers say of embeddings.
        labels: names of those that the head scores.
        chances: makes probabilities of their logits; ``None`` for a regression.
        token_types: how many a text's tokens may have; 0 where transformers passes none to the model.
        dtype: of weights and computation.
        linears: what computes its linear layers, part of a sentence.
    """

    encoder: Encoder
    head: Head | None
    architecture: str
    tasks: tuple[Task, ...]
    parameters: int
    weight_bytes: int
    layers: int
    vocabulary_size: int
    context_length: int
    embedding_size: int
    files: SentenceFiles
    labels: list[str]
    chances: Chances | None
    token_types: int
    dtype: torch.dtype
    linears: str


def load_encoder(
    folder: Path, dtype: str, device: str, max_context: int | None, report: Callable[[str, float], None]
) -> LoadedEncoder:
    """Loads, freezes, and proves. Code that comes with a checkpoint is never run.

    Args:
        folder: a Hugging Face folder.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is float32 on the CPU and the checkpoint's
            own elsewhere.
        device: ``cpu`` or ``cuda``.
        max_context: tokens of the longest text; ``None`` for the model's own limit.
        report: told the progress.

    Raises:
        RefusedError: the model can't be served; the sentence says why.
    """
    report("reading the config", 0.0)
    config = read_any_config(folder)
    tasks = read_tasks(config)
    if not is_encoder(config):
        check_embedder(folder, config)
    files = read_sentence_files(folder)
    stored = read_stored(weight_files(folder))
    tasks = _with_head(tasks, config, stored)
    kind, more = _class(config, tasks)
    settle(config)
    model = read_model(kind, folder, config, stored, dtype, torch.device(device), report, **more)
    architecture, takes_attention = type(model).__name__, model._can_set_attn_implementation()
    parameters = sum(weight.numel() for weight in model.parameters())
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    base = model.base_model
    report("checking", 0.7)
    with refusing(architecture, "the start-up check"):
        vocabulary = base.get_input_embeddings().num_embeddings
        first = first_position(base)
        length = _context_length(base, first, files, max_context)
        texts = proof_texts(vocabulary, length, reach(config))
        if not takes_attention:
            reset(base, length)
        own, logits = compute_own(model, texts)
        if takes_attention:
            causal = is_causal(base)
            register()
            model.set_attn_implementation("longspan")
        linears = prepack(model)
        encoder: Encoder = (
            Flattened(base, first, causal=causal)
            if takes_attention
            else ByLength(base, classifies=Task.SCORE in tasks)
        )
        check(encoder, texts, own, architecture)
        head = None if logits is None else Head(model)
        if head is not None and logits is not None:
            check_head(head, own, logits, model.dtype, architecture)
    with refusing(architecture, "reading its tokenizer"):
        tokenizer = _tokenizer(folder, config, tasks, files, length)
        passed = tokenizer is not None and "token_type_ids" in tokenizer.model_input_names
    log.info("%s", linears)
    return LoadedEncoder(
        encoder=encoder,
        head=head,
        architecture=architecture,
        tasks=tasks,
        parameters=parameters,
        weight_bytes=weight_bytes,
        layers=config.num_hidden_layers,
        vocabulary_size=vocabulary,
        context_length=length,
        embedding_size=own[0].shape[1],
        files=files,
        labels=_labels(config) if Task.SCORE in tasks else [],
        chances=chances(config) if Task.SCORE in tasks else None,
        token_types=encoder.token_types if passed else 0,  # not all that a tokenizer makes are meant
        dtype=model.dtype,
        linears=linears,
    )


def _labels(config: Any) -> list[str]:
    """Names of the labels.

    Raises:
        RefusedError: one of them is no text that an answer can have.
    """
    labels = [str(config.id2label[index]) for index in range(config.num_labels)]
    if wrong := [label for label in labels if not is_unicode(label)]:
        raise RefusedError(
            f"config.json names the label {quoted(wrong[0])}, which has half of a surrogate pair and so is "
            "no text; fetch the model's own file again"
        )
    return labels


def _with_head(tasks: tuple[Task, ...], config: Any, stored: Mapping[str, Stored]) -> tuple[Task, ...]:
    """The tasks without ``FILL``, where the files hold only what is below the head that the config names.

    Makers of embeddings often keep the config of the model that they began with, as all-mpnet-base-v2's did.
    """
    if Task.FILL not in tasks:
        return tasks
    own = _CLASSES[Task.FILL]._model_mapping[type(config)]
    if any(name.startswith(f"{own.base_model_prefix}.") for name in stored):
        return tasks
    log.warning("the config names %s, but the weights have no head: masks can't be filled", own.__name__)
    return tuple(task for task in tasks if task is not Task.FILL)


def _class(config: Any, tasks: tuple[Task, ...]) -> tuple[Any, dict[str, Any]]:
    """The class to load, and its arguments: without a head a pooler might have random weights."""
    kind = next((_CLASSES[task] for task in tasks if task in _CLASSES), None)
    if kind is not None:
        return kind, {}
    own = transformers.AutoModel._model_mapping[type(config)]
    bare = "add_pooling_layer" in inspect.signature(own.__init__).parameters
    return transformers.AutoModel, {"add_pooling_layer": False} if bare else {}


@without_panics
def _tokenizer(folder: Path, config: Any, tasks: tuple[Task, ...], files: SentenceFiles, length: int) -> Any:
    """transformers' own tokenizer; ``None`` where there is none, and only token ids are served.

    Raises:
        RefusedError: what it adds to texts leaves no room for them.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, config=config, local_files_only=True, trust_remote_code=False
    )
    _check_room(tokenizer.num_special_tokens_to_add(pair=Task.SCORE in tasks), length)
    _check_prompt(tokenizer, files, length)
    return tokenizer


def _check_room(special: int, length: int) -> None:
    if special >= length:
        raise RefusedError(
            f"a text has {special} special tokens and at most {length} in all, so that none of its own fit; "
            f"choose a --max-context larger than {special}"
        )


def _check_prompt(tokenizer: Any, files: SentenceFiles, length: int) -> None:
    """Refuses a usual prompt that leaves no room for a text, so that all that name none would be refused."""
    if not files.default_prompt:
        return
    count = len(tokenizer(files.prompts[files.default_prompt]).input_ids)
    if count >= length:
        raise RefusedError(
            f"texts begin with the prompt {quoted(files.default_prompt)}, whose {count} tokens leave no room "
            f"in texts of at most {length}; choose a larger --max-context, or take default_prompt_name out "
            "of config_sentence_transformers.json"
        )


def _context_length(base: Any, first: int, files: SentenceFiles, max_context: int | None) -> int:
    table = position_table(base)
    own = context_length(base.config, None) if table is None else table.num_embeddings - first
    check_positions(max_context, own)
    usual = own if files.longest is None else min(files.longest, own)
    if max_context is None and usual < own:
        log.info(
            "texts have up to %d tokens, as the model's makers had; --max-context %d for more", usual, own
        )
    return max_context or usual
