"""Pages for sequences: growing, sharing prefixes, giving back."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

from server.engine.page_pool import PagePool
from server.engine.sequence import Sequence


class KVManager:
    """Gives sequences their pages and finds prompts that were computed before.

    A full page is known by a key that chains over all tokens up to its end (``H(key of the page before,
    the page's tokens)``), so equal keys mean equal prefixes. The hash is 128 bits of BLAKE2b: finding
    two prefixes with one key is out of reach, also for someone who tries.

    Only full pages are shared, and a sequence writes only behind its computed tokens, so a shared page is
    never written and needs no copy.

    Args:
        pages: number of pages, page 0 included.
        page_size: tokens per page.
        prefix_cache: keep pages of computed tokens for sequences to come.
    """

    def __init__(self, pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        self.pool = PagePool(pages)
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def capacity(self) -> int:
        """Tokens that a single sequence alone could hold."""
        return self.pool.total * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens take."""
        return -(-tokens // self.page_size)

    def adopt_prefix(self, sequence: Sequence) -> None:
        """Gives a sequence without pages those of its longest computed prefix.

        At least one token is left to compute, since its logits are needed. A sequence that still owes
        log probabilities of its prompt gets none.
        """
        if not self.prefix_cache or sequence.wants_prompt_logprobs:
            return
        usable = (sequence.total - 1) // self.page_size
        pages = self.pool.find(self._keys(sequence, usable))
        self.pool.hold(pages)
        sequence.pages = pages
        sequence.computed = len(pages) * self.page_size

    def count_lookup(self, sequence: Sequence) -> None:
        """Books the outcome of ``adopt_prefix`` once the sequence really runs."""
        if self.prefix_cache and not sequence.wants_prompt_logprobs:
            self.prefix_queries += sequence.total
            self.prefix_hits += sequence.computed

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Makes room for the next ``tokens`` tokens; false, and nothing changed, if pages are short."""
        missing = self.pages_for(sequence.computed + tokens) - len(sequence.pages)
        if missing > 0:
            pages = self.pool.allocate(missing)
            if pages is None:
                return False
            sequence.pages.extend(pages)
        return True

    def advance(self, sequence: Sequence, tokens: int) -> None:
        """Books ``tokens`` more tokens as computed, and publishes the pages that this completes."""
        before = sequence.computed // self.page_size
        sequence.computed += tokens
        full = sequence.computed // self.page_size
        if self.prefix_cache and full > before:
            keys = self._keys(sequence, full)
            for index in range(before, full):
                self.pool.publish(sequence.pages[index], keys[index])

    def release(self, sequence: Sequence) -> None:
        """Takes all pages from a sequence; it would have to compute its tokens again."""
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Checks the pool against ``sequences``, which must be all that hold pages.

        Raises:
            server.engine.page_pool.IntegrityError: the books differ.
        """
        self.pool.check_integrity(sequence.pages for sequence in sequences)

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        keys = sequence.page_keys
        while len(keys) < count:
            start = len(keys) * self.page_size
            page = array("I", sequence.tokens[start : start + self.page_size])
            previous = keys[-1] if keys else b""
            keys.append(hashlib.blake2b(previous + page.tobytes(), digest_size=16).digest())
        return keys[:count]
