"""Token counts of text, by a tokenizer that the user names."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from loadtest.load.targets import EndpointError


class Counter:
    """A tokenizer, as far as a load test needs it.

    Args:
        name: a ``tokenizer.json``, its folder, or a name on the Hugging Face Hub.

    Raises:
        EndpointError: there is none, or what reads it is not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise EndpointError("--tokenizer needs tokenizers; run: pip install 'longspan[load]'") from None
        path = Path(name)
        file = path / "tokenizer.json" if path.is_dir() else path
        if path.exists() and not file.is_file():
            raise EndpointError(f"{path} has no tokenizer.json; name the folder or file that is one")
        try:
            if file.is_file():
                self._tokenizer = Tokenizer.from_file(str(file))
            else:
                self._tokenizer = Tokenizer.from_pretrained(name)
        except Exception as error:  # tokenizers raises nothing more specific
            raise EndpointError(
                f"the tokenizer {name!r} can't be read: {error}; give a tokenizer.json, its folder, or a "
                "name on the Hugging Face Hub"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def count(self, text: str) -> int:
        """Tokens of a text, without those that the tokenizer puts around it."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def per_part(self, parts: Sequence[str]) -> list[int]:
        """How many tokens of a text each of its parts brought: each counts where its last character came."""
        text = "".join(parts)
        ends = list(itertools.accumulate(len(part) for part in parts))
        counts = [0] * len(parts)
        for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets:
            counts[min(bisect.bisect_left(ends, end), len(parts) - 1)] += 1
        return counts


@cache
def counter(name: str) -> Counter:
    """The tokenizer of that name, read once in this process."""
    return Counter(name)


def spread_evenly(total: int, parts: int) -> list[int]:
    """``total`` tokens over ``parts`` messages, as evenly as whole numbers allow."""
    return [(index + 1) * total // parts - index * total // parts for index in range(parts)]
