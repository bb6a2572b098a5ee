"""What looks for stop strings in beams: the server process's own code, over the same tokenizer's texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.messages import StopTexts
from server.text.assemble import OutputAssembler
from server.text.stop import StopStrings

if TYPE_CHECKING:
    from server.text.decoding import Decoding


class TextsOfBeams:
    """Makes the texts in which stop strings are found.

    Other requests' stop strings are the server process's. A search can't wait for that one after each step,
    so the tokenizer is loaded here too, for the first search that needs it.

    Args:
        folder: of the tokenizer; ``None`` if the model has none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._decoding: Decoding | None = None

    def begin(self, stop: StopTexts) -> OutputAssembler:
        """The text of no token.

        Raises:
            ValueError: the tokenizer can't be loaded.
        """
        if self._decoding is None:
            self._decoding = self._load()
        return OutputAssembler(
            self._decoding,
            stop=StopStrings(stop.strings, self._decoding.special_tokens),
            keep_special_tokens=stop.keep_special_tokens,
            min_tokens=stop.min_tokens,
        )

    def _load(self) -> Decoding:
        from server.text.decoding import Decoding

        if self._folder is None:
            raise ValueError("stop strings of beams need a tokenizer, and the engine was given none")
        try:
            return Decoding.read(self._folder)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ValueError(f"the tokenizer of {self._folder} can't be read any more: {error}") from error
