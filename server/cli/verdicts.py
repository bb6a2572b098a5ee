"""``longspan backends`` for models whose attention is not chosen: encoders, and encoder-decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from server.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.settings import Settings


class Judged(NamedTuple):
    """A model that the server would serve.

    Attributes:
        document: of it, as JSON.
        words: the same for people.
    """

    document: dict[str, Any]
    words: str


def judge_encoder(
    name: str,
    folder: Path,
    settings: Settings,
    attention: str | None,
    options: dict[str, str],
    report: Callable[[str, float], None],
) -> Judged:
    """Loads and proves an encoder as the server does.

    Raises:
        RefusedError: it can't be served so, or a backend is asked for.
    """
    from server.engine.encoder_build import build_encoder

    given = {"--attention": attention, "--attention-option": options}
    if asked := [flag for flag, value in given.items() if value]:
        raise RefusedError(
            f"{', '.join(asked)}: for models that generate text, and {name} is an encoder; leave it out"
        )
    _, ready = build_encoder(settings, folder, report)
    tasks = [str(task) for task in ready.tasks]
    document = {
        "model": name,
        "architecture": ready.architecture,
        "device": ready.device,
        "dtype": ready.dtype,
        "tasks": tasks,
        "attention": {"pattern": ready.attention_pattern, "kernel": ready.attention_kernel},
    }
    return Judged(
        document,
        f"{name}: {ready.architecture}, an encoder of {ready.layers} layers; on {ready.device}, "
        f"{ready.dtype}\n"
        f"Its tasks: {', '.join(tasks)}. It generates no text, so there is no backend to choose: "
        f"{ready.attention_reason} "
        f"({ready.attention_pattern} attention, {ready.attention_kernel} kernel).",
    )


def judge_encoder_decoder(
    name: str,
    folder: Path,
    settings: Settings,
    attention: str | None,
    options: dict[str, str],
    report: Callable[[str, float], None],
) -> Judged:
    """Loads and proves an encoder-decoder, whose decoder sees all of its tokens, as the server does.

    Raises:
        RefusedError: it can't be served so.
    """
    from server.engine.prepare_encoder_decoder import prepare_encoder_decoder

    given = {"attention": attention, "attention_option": options}
    asked = settings.model_copy(update={name: value for name, value in given.items() if value})
    prepared = prepare_encoder_decoder(asked, folder, report)
    loaded, made, info = prepared.loaded, prepared.attention, prepared.encoder_decoder
    assert info is not None
    document = {
        "model": name,
        "architecture": loaded.architecture,
        "device": prepared.device,
        "dtype": prepared.weights,
        "tasks": ["generate"],
        "speculate": [],
        "source_length": info.source_length,
        "target_length": info.target_length,
        "attention": {"pattern": made.pattern.name, "kernel": made.kernel.name},
    }
    return Judged(
        document,
        f"{name}: {loaded.architecture}, an encoder-decoder of {len(loaded.layers)} decoder layers; "
        f"on {prepared.device}, {prepared.weights}\n"
        "Its task: generate. Speculation: none\n"
        f"Sources have up to {info.source_length} tokens, targets up to {info.target_length}. Its "
        "decoder sees all of its own tokens and all of its source "
        f"({made.kernel.name} kernel: {made.reason}).",
    )
