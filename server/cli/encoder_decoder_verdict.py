"""``longspan backends`` for an encoder-decoder, whose decoder sees all of its tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.engine.prepare import Prepared
    from server.settings import Settings


class EncoderDecoderVerdict(NamedTuple):
    """An encoder-decoder that the server would serve.

    Attributes:
        name: of the model.
        prepared: as its engine would run it.
    """

    name: str
    prepared: Prepared

    def text(self, *, as_json: bool) -> str:
        """What to print."""
        loaded, attention, info = self.prepared.loaded, self.prepared.attention, self.prepared.encoder_decoder
        assert info is not None
        if as_json:
            document = {
                "model": self.name,
                "architecture": loaded.architecture,
                "device": self.prepared.device,
                "dtype": self.prepared.weights,
                "tasks": ["generate"],
                "speculate": [],
                "source_length": info.source_length,
                "target_length": info.target_length,
                "attention": {"pattern": attention.pattern.name, "kernel": attention.kernel.name},
            }
            return json.dumps(document, indent=2)
        return (
            f"{self.name}: {loaded.architecture}, an encoder-decoder of {len(loaded.layers)} decoder layers; "
            f"on {self.prepared.device}, {self.prepared.weights}\n"
            "Its task: generate. Speculation: none\n"
            f"Sources have up to {info.source_length} tokens, targets up to {info.target_length}. Its "
            "decoder sees all of its own tokens and all of its source "
            f"({attention.kernel.name} kernel: {attention.reason})."
        )


def judge_encoder_decoder(
    name: str,
    folder: Path,
    settings: Settings,
    attention: str | None,
    options: dict[str, str],
    report: Callable[[str, float], None],
) -> EncoderDecoderVerdict:
    """Loads and proves an encoder-decoder as the server does.

    Raises:
        RefusedError: it can't be served so.
    """
    from server.engine.prepare_encoder_decoder import prepare_encoder_decoder

    given = {"attention": attention, "attention_option": options}
    asked = settings.model_copy(update={name: value for name, value in given.items() if value})
    return EncoderDecoderVerdict(name, prepare_encoder_decoder(asked, folder, report))
