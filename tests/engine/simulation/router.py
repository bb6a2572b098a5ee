"""A router's index of pages, from the events of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from server.kv_messages import Event


class Index:
    """Stands in for ``KVEvents``: knows which pages can be found, and the prompt that each ends.

    Attributes:
        findable: the keys of pages that can be found.
        prompts: all tokens up to a page's end, by its key, also of pages that were findable once.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.findable: set[bytes] = set()
        self.prompts: dict[bytes, list[int]] = {}

    def stored(self, before: bytes | None, keys: Sequence[bytes], token_ids: list[int]) -> None:
        assert len(token_ids) == self._page_size * len(keys)
        prompt = [] if before is None else self.prompts[before]
        for i, key in enumerate(keys):
            assert key not in self.findable, "a page is told of twice"
            prompt = prompt + token_ids[i * self._page_size : (i + 1) * self._page_size]
            assert self.prompts.setdefault(key, prompt) == prompt, "a key stands for two prompts"
            self.findable.add(key)

    def removed(self, key: bytes) -> None:
        self.findable.remove(key)

    def take(self) -> list[Event]:
        return []  # each is known already
