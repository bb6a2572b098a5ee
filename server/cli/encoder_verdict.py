"""``longspan backends`` for an encoder, whose attention is not chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from server.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.messages import Ready
    from server.settings import Settings


class EncoderVerdict(NamedTuple):
    """An encoder that the server would serve.

    Attributes:
        name: of the model.
        ready: what its engine would run.
    """

    name: str
    ready: Ready

    def text(self, *, as_json: bool) -> str:
        """What to print."""
        ready, tasks = self.ready, [str(task) for task in self.ready.tasks]
        if as_json:
            document = {
                "model": self.name,
                "architecture": ready.architecture,
                "device": ready.device,
                "dtype": ready.dtype,
                "tasks": tasks,
                "attention": {"pattern": ready.attention_pattern, "kernel": ready.attention_kernel},
            }
            return json.dumps(document, indent=2)
        return (
            f"{self.name}: {ready.architecture}, an encoder of {ready.layers} layers; on {ready.device}, "
            f"{ready.dtype}\n"
            f"Its tasks: {', '.join(tasks)}. It generates no text, so there is no backend to choose: "
            f"{ready.attention_reason} "
            f"({ready.attention_pattern} attention, {ready.attention_kernel} kernel)."
        )


def judge_encoder(
    name: str,
    folder: Path,
    settings: Settings,
    attention: str | None,
    options: dict[str, str],
    report: Callable[[str, float], None],
) -> EncoderVerdict:
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
    return EncoderVerdict(name, ready)
