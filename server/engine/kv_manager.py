"""Pages for sequences: growing, sharing prefixes, freeing."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable

from server.engine.kv_events import KVEvents
from server.engine.page_pool import PagePool
from server.engine.sequence import Sequence
from server.kv_messages import Event

Expired = Callable[[int, int], range]
Salt = Callable[[int, int, int], bytes]


def most_pages(tokens: int, step: int, page_size: int, expired: Expired) -> int:
    """The most pages that a sequence holds at once until ``tokens`` tokens are computed.

    Args:
        tokens: prompt and output.
        step: the most tokens computed before expired pages are freed.
        page_size: tokens per page.
        expired: the attention pattern's.
    """
    pages, chunk = -(-tokens // page_size), -(-step // page_size)
    # Depending on where pages begin, one more can be held at an earlier time than at the end.
    return min(pages, pages - len(expired(tokens, page_size)) + chunk + 1)


class KVManager:
    """Gives sequences their pages and finds prompts that were computed before.

    A full page is known by a key that chains over all tokens up to its end (``H(key of the page before,
    the page's tokens, salt)``), so equal keys mean equal prefixes; the first page's chains to the salt of its
    sequence, so that only sequences of one salt have equal keys. The hash is 128 bits of BLAKE2b: finding
    two prefixes with one key is infeasible, even on purpose.

    A sequence writes only behind its computed tokens, so that a full page is never written again. One that is
    not full is shared by sequences that were forked, and copied before one of them writes to it.

    Args:
        pages: number of pages, page 0 included.
        page_size: tokens per page.
        prefix_cache: keep pages of computed tokens for sequences to come.
        expired: the attention pattern's ``expired``: from a number of computed tokens and a page size, the
            pages of a sequence that no query will read again. A sequence frees these as it goes.
        prompts_only: share only pages that are wholly inside a prompt, since the keys of an output token are
            not those that the same token has in a prompt.
        salt: for a sequence's prompt length, its tokens so far and the first position of a page, what else
            the page's keys depend on.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        *,
        prefix_cache: bool = True,
        expired: Expired = lambda seq_len, page_size: range(0),
        prompts_only: bool = False,
        salt: Salt | None = None,
    ) -> None:
        self.pool = PagePool(pages)
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.expired = expired
        self._prompts_only = prompts_only
        self.salt = salt
        self._events: KVEvents | None = None
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._copies: dict[int, int] = {}

    def tell(self, events: KVEvents) -> None:
        """From now on ``events`` learns which pages can be found."""
        self._events = events
        self.pool.forgotten = events.removed

    def take_events(self) -> list[Event]:
        """What it has told since the last time, where that is kept."""
        return [] if self._events is None else self._events.take()

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens take."""
        return -(-tokens // self.page_size)

    def demand(self, tokens: int, step: int) -> int:
        """``most_pages`` of a sequence, at most the whole pool: the context fits an empty pool."""
        return min(most_pages(tokens, step, self.page_size, self.expired), self.pool.total)

    def demand_of(self, sequence: Sequence, step: int) -> int:
        """``demand`` of a sequence that is queued, of its beams together."""
        (count, alike), tokens = sequence.spread, sequence.parts[0].total
        each = most_pages(tokens, step, self.page_size, self.expired)
        own = self.pages_for(tokens) - alike // self.page_size
        return min(each + (count - 1) * min(each, own), self.pool.total)

    def most_of_beams(self, prompt: int, tokens: int, beams: int, step: int) -> int:
        """The most pages that so many beams of so many tokens, with a prompt in common, hold at once."""
        each, shared = most_pages(tokens, step, self.page_size, self.expired), prompt // self.page_size
        return min(beams * each, shared + beams * (self.pages_for(tokens) - shared))

    def cached_prefix(self, sequence: Sequence) -> int:
        """Tokens of a sequence without pages that ``adopt_prefix`` would give it now."""
        if not self.looks_up(sequence):
            return 0
        count, _, found = self._cached_prefix(sequence)
        sequence.shared = self.pool.count_held(found) - self.pool.gained
        return count * self.page_size

    def most_shared(self, sequence: Sequence) -> int:
        """The most pages that ``adopt_prefix`` could give a sequence of those that others hold.

        Told without looking up any: as many as when it was looked up last, and one more for each page that
        a sequence got of the index, or added to it, since.
        """
        return sequence.shared + self.pool.gained

    def looks_up(self, sequence: Sequence) -> bool:
        """Whether a sequence may take pages from the prefix cache."""
        return self.prefix_cache and not sequence.wants_prompt_logprobs

    def adopt_prefix(self, sequence: Sequence) -> None:
        """Gives a sequence without pages those of its longest computed prefix that are still needed.

        At least one token is left to compute, since its logits are needed. A sequence that still owes
        log probabilities of its prompt gets none. A hit does not need expired pages.
        """
        if not self.looks_up(sequence):
            return
        count, evicted, found = self._cached_prefix(sequence)
        pages = found[:count]
        pages[evicted.start : evicted.stop] = [0] * len(evicted)
        shared = self.pool.count_held(found)
        self.pool.hold(pages)
        sequence.shared = shared - self.pool.gained
        sequence.table.replace(pages)
        sequence.evicted_up_to = evicted.stop
        sequence.computed = count * self.page_size

    def _cached_prefix(self, sequence: Sequence) -> tuple[int, range, list[int]]:
        """How many leading pages are found, which of them are not needed, and the page of each key, or 0."""
        usable = sequence.total - sequence.held_back - 1
        usable = min(usable, self._shareable(sequence)) // self.page_size
        keys = self._keys(sequence, usable)
        found = self.pool.find(keys)
        if not self.expired(usable * self.page_size, self.page_size):
            # Every page is needed, so that the first that is missing ends the prefix.
            leading = found.index(0) if 0 in found else len(found)
            whole = leading * self.page_size >= sequence.decoded_from
            return (leading if whole else 0), range(0), found
        return *self._longest_prefix(found), found

    def _longest_prefix(self, found: list[int]) -> tuple[int, range]:
        """How many leading pages make a prefix, and which of those are not needed for it."""
        run = [0]  # run[i]: how many pages before index i were found in a row
        for page in found:
            run.append(run[-1] + 1 if page else 0)
        leading = next((i for i, page in enumerate(found) if not page), len(found))
        for count in range(len(found), 0, -1):
            evicted = self.expired(count * self.page_size, self.page_size)
            if run[count] >= count - evicted.stop and leading >= min(evicted.start, count):
                return count, evicted
        return 0, range(0)

    def count_lookup(self, sequence: Sequence) -> None:
        """Books the outcome of ``adopt_prefix`` once the sequence really runs."""
        if self.looks_up(sequence):
            self.prefix_queries += sequence.total
            self.prefix_hits += sequence.computed

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Makes room for the next ``tokens`` tokens; false, and nothing changed, if pages are short."""
        missing = max(0, self.pages_for(sequence.computed + tokens) - len(sequence.pages))
        copied = self.copied(sequence)
        if not missing and not copied:
            return True
        pages = self.pool.allocate(missing + copied)
        if pages is None:
            return False
        if copied:
            index = sequence.computed // self.page_size
            old, new = sequence.pages[index], pages.pop()
            self._copies.pop(new, None)  # of a sequence that has lost it since
            self._copies[new] = old
            sequence.table.put(index, new)
            self.pool.release([old])
        sequence.pages.extend(pages)
        return True

    def copied(self, sequence: Sequence) -> bool:
        """Whether its next token goes to a page that it may not write to, and so takes one for a copy."""
        index, begun = divmod(sequence.computed, self.page_size)
        return bool(begun) and self.pool.fixed(sequence.pages[index])

    def fork(self, sequence: Sequence, other: Sequence, tokens: int) -> None:
        """Gives another sequence, which has no pages, those of so many computed tokens."""
        pages = sequence.pages[: self.pages_for(tokens)]
        self.pool.hold(pages)
        other.table.replace(pages)
        other.computed, other.evicted_up_to = tokens, sequence.evicted_up_to
        other.page_keys = sequence.page_keys[: tokens // self.page_size]

    def take_copies(self) -> dict[int, int]:
        """The pages to be copied before the next step writes any, in order: from, by to."""
        copies, self._copies = self._copies, {}
        return copies

    def advance(self, sequence: Sequence, tokens: int) -> None:
        """Books ``tokens`` more as computed, publishes pages that this completes and frees expired ones.

        The step that computes them need only be launched: a device computes in order, so a sequence that
        finds these pages, or gets the freed ones, reads and writes them after this step.
        """
        before = min(sequence.computed, len(sequence.tokens))
        sequence.computed += tokens
        self._settle(sequence, before)

    def retract(self, sequence: Sequence, tokens: int) -> None:
        """Books the last ``tokens`` computed ones, which were drafted and rejected, as not computed.

        Pages that only they took are freed, so that no other sequence lacks them.
        """
        sequence.computed -= tokens
        kept = self.pages_for(sequence.computed)
        if len(sequence.pages) > kept:
            self.pool.release(sequence.pages[kept:])
            sequence.table.cut(kept)

    def append(self, sequence: Sequence, token: int) -> None:
        """Appends the sequence's next token, which may have been computed already: see ``advance``."""
        before = len(sequence.tokens)
        sequence.tokens.append(token)
        if sequence.computed > before:
            self._settle(sequence, before)

    def _settle(self, sequence: Sequence, before: int) -> None:
        """Publishes and frees pages, now that more than ``before`` tokens are both known and computed.

        A token that is computed but not known can be in no page's key, and it may have to be computed again:
        for that it needs the pages that it saw.
        """
        settled = min(sequence.computed, len(sequence.tokens))
        if settled == before or settled < sequence.decoded_from:
            return
        if before < sequence.decoded_from:
            before = 0  # a source is computed as a whole, with its last token
        first, full = before // self.page_size, min(settled, self._shareable(sequence)) // self.page_size
        if self.prefix_cache and full > first:
            keys = self._keys(sequence, full)
            new = [
                index for index in range(first, full) if self.pool.publish(sequence.pages[index], keys[index])
            ]
            if new and self._events is not None:
                self._tell(self._events, sequence, keys, new)
        evicted = self.expired(settled, self.page_size)
        newly = range(max(evicted.start, sequence.evicted_up_to), evicted.stop)
        if newly:
            self.pool.release(sequence.pages[newly.start : newly.stop])
            sequence.pages[newly.start : newly.stop] = [0] * len(newly)
            sequence.evicted_up_to = evicted.stop

    def _tell(self, events: KVEvents, sequence: Sequence, keys: list[bytes], new: list[int]) -> None:
        """Tells of pages that have become findable, those that follow one another at once."""
        for _, group in itertools.groupby(enumerate(new), lambda pair: pair[1] - pair[0]):
            indices = [index for _, index in group]
            first, end = indices[0], indices[-1] + 1
            tokens = sequence.tokens[first * self.page_size : end * self.page_size]
            events.stored(keys[first - 1] if first else None, keys[first:end], list(tokens))

    def release(self, sequence: Sequence) -> None:
        """Takes all pages from a sequence; it would have to compute its tokens again."""
        self.pool.release(sequence.pages)
        sequence.table.replace([])
        sequence.evicted_up_to = 0
        sequence.computed = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Checks the pool against ``sequences``, which must be all that hold pages.

        Raises:
            server.engine.page_pool.IntegrityError: they differ.
        """
        self.pool.check_integrity(sequence.pages for sequence in sequences)

    def _shareable(self, sequence: Sequence) -> int:
        """How many of its first tokens have the keys that they would have in any sequence."""
        return sequence.prompt_len if self._prompts_only else sequence.total

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        keys = sequence.page_keys
        while len(keys) < count:
            start = len(keys) * self.page_size
            page = array("I", sequence.tokens[start : start + self.page_size])
            previous = keys[-1] if keys else sequence.request.salt
            content = previous + page.tobytes()
            if self.salt is not None:
                content += self.salt(sequence.prompt_len, sequence.total, start)
            keys.append(hashlib.blake2b(content, digest_size=16).digest())
        return keys[:count]
