"""Token ids to text: the half of a tokenizer that the engine process can load without transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel

from server.panics import without_panics


class Decoding:
    """Texts of tokens. Methods may be called from several threads.

    Args:
        backend: of the tokenizers library.

    Attributes:
        special_tokens: tokens that are no text, such as those that mark the turns of a conversation: ids by
            spelling.
        special_token_ids: their ids.
        byte_level: a token stands for the same bytes wherever it is, so that tokens of whole characters can
            be decoded one by one.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.special_tokens: dict[str, int] = {
            added.content: token
            for token, added in backend.get_added_tokens_decoder().items()
            if added.special
        }
        self.special_token_ids = frozenset(self.special_tokens.values())
        self.byte_level = isinstance(backend.decoder, ByteLevel)

    @classmethod
    @without_panics
    def read(cls, folder: Path) -> Decoding:
        """That of a folder with a ``tokenizer.json``, with the same texts as ``server.text.tokenizer`` has.

        transformers adds tokens that only the files beside it name, and makes others special. It is imported,
        which takes a second, where there are such.

        Raises:
            Exception: it can't be read; the tokenizers library raises nothing narrower.
        """
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
        if all(added.get(content) in alike for content, alike in _named_beside(folder)):
            return cls(backend)
        from transformers import PreTrainedTokenizerFast

        return cls(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True).backend_tokenizer)

    @without_panics
    def decode_known(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids that the model chose; those with no entry are no text.

        Bytes that are not UTF-8 become U+FFFD.
        """
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str:
        """A token's entry in the vocabulary, such as ``Ġthe``; empty for an id that has none."""
        return self._backend.id_to_token(token_id) or ""

    @functools.lru_cache(maxsize=65536)  # noqa: B019 (a process has one tokenizer, and keeps it)
    def decode_alone(self, token_id: int, skip_special_tokens: bool) -> str:
        """``decode_known`` of one token, kept: a look-up costs a fraction of decoding."""
        return self.decode_known([token_id], skip_special_tokens=skip_special_tokens)

    def is_text(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether decoding gives the token any text, or part of a character."""
        if skip_special_tokens and token_id in self.special_token_ids:
            return False
        return bool(self.token(token_id))


def _named_beside(folder: Path) -> Iterator[tuple[str, tuple[bool, ...]]]:
    """Tokens that the files beside ``tokenizer.json`` name, each with what its ``special`` may be."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if name == "added_tokens.json":
            yield from ((content, (False, True)) for content in said)
            continue
        for key, value in said.items():
            tokens: Iterable[Any] = ()
            if key.endswith("_token"):
                tokens = [value]
            elif key.endswith("special_tokens") or key == "added_tokens_decoder":
                tokens = (
                    value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
                )
            for token in tokens:
                if isinstance(token, str):
                    yield token, (True,)
                elif isinstance(token, dict):
                    yield token["content"], (token.get("special", True),)
