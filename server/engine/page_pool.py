"""The pages of the KV cache: held by sequences, free, or cached for later prompts."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence


class IntegrityError(AssertionError):
    """The allocator's bookkeeping contradicts itself: a bug in the engine, never a user's mistake."""


class PagePool:
    """Reference-counted pages, with an index of finished ones by content.

    A page is in exactly one of three states: *held* by one or more sequences; *cached*, held by no sequence
    but findable by its key; or *free*. Pages are taken from the free ones first, the last freed of them
    first, as memory that was never used need not be touched for it; then from the cached ones, the least
    recently used first. Page 0 is never handed out: page tables use it for "no page".

    Args:
        pages: number of pages, page 0 included; at least 2.

    Attributes:
        gained: how often a page became both held and findable.
        forgotten: is told the key of each page that can no longer be found.
    """

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise ValueError(f"a pool needs at least 2 pages, page 0 included, not {pages}")
        self.pages = pages
        self._holders = [0] * pages
        self._key_of: list[bytes | None] = [None] * pages
        self._page_of: dict[bytes, int] = {}
        self.gained = 0
        self.forgotten: Callable[[bytes], None] = lambda key: None
        self._free = deque(range(1, pages))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def total(self) -> int:
        """Pages that can be handed out."""
        return self.pages - 1

    @property
    def available(self) -> int:
        """Pages that can be handed out now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that only the index holds."""
        return len(self._cached)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.total - self.available

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages for one new holder, or ``None`` if there are not that many: all or nothing."""
        if count > self.available:
            return None
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The page of each key, 0 for a key that the index does not know. Holds none of them."""
        return [self._page_of.get(key, 0) for key in keys]

    def count_held(self, pages: Iterable[int]) -> int:
        """How many of ``pages`` are held; zeros ("no page") are not."""
        return sum(self._holders[page] > 0 for page in pages)

    def freed(self, pages: Iterable[int]) -> int:
        """How many pages would be available if these lost a holder each time that they are named."""
        named = Counter(pages)
        return sum(count == self._holders[page] for page, count in named.items() if page)

    def fixed(self, page: int) -> bool:
        """Whether a page has several holders, or can be found, so that none may write to it."""
        return self._holders[page] > 1 or self._key_of[page] is not None

    def hold(self, pages: Iterable[int]) -> None:
        """Adds a holder to each of ``pages``, which are held or cached; zeros ("no page") are passed over."""
        for page in pages:
            if page == 0:
                continue
            if self._holders[page] == 0:
                del self._cached[page]
                self.gained += 1
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes a holder off each of ``pages``; zeros ("no page") are passed over.

        The last in the list is the first to be evicted: a page of a prompt is useless without the pages
        before it.
        """
        for page in reversed(pages):
            if page == 0:
                continue
            self._holders[page] -= 1
            if self._holders[page] > 0:
                continue
            if self._holders[page] < 0:
                raise IntegrityError(f"page {page} was released more often than it was held")
            if self._key_of[page] is None:
                self._free.appendleft(page)
            else:
                self._cached[page] = None

    def publish(self, page: int, key: bytes) -> bool:
        """Makes a held page, whose content is complete, findable, and says whether it was not before.

        The first page of a content stays.
        """
        if key in self._page_of or self._key_of[page] is not None:
            return False
        self._page_of[key] = page
        self._key_of[page] = key
        self.gained += 1
        return True

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        key = self._key_of[page]
        if key is None:
            raise IntegrityError(f"page {page} is cached without a key")
        del self._page_of[key]
        self._key_of[page] = None
        self.forgotten(key)
        return page

    def check_integrity(self, holdings: Iterable[Sequence[int]]) -> None:
        """Checks the bookkeeping against itself and against the page lists of all holders.

        Args:
            holdings: the pages of every holder there is, one list each; zeros ("no page") are passed over.

        Raises:
            IntegrityError: they differ; the message says where.
        """
        counted = [0] * self.pages
        for pages in holdings:
            for page in pages:
                if page:
                    counted[page] += 1
        if counted != self._holders:
            wrong = [p for p in range(self.pages) if counted[p] != self._holders[p]]
            raise IntegrityError(
                f"pages {wrong[:8]} are held {[counted[p] for p in wrong[:8]]} times, "
                f"but the pool counts {[self._holders[p] for p in wrong[:8]]}"
            )
        if self._holders[0] or self._key_of[0] is not None:
            raise IntegrityError("page 0 was handed out")
        # Counts and whole passes of the interpreter's own, since tests do this after every step.
        idle, apart = {*self._free, *self._cached}, len(self._free) + len(self._cached)
        if not len(idle) == apart == self._holders.count(0) - 1 or any(map(self._holders.__getitem__, idle)):
            raise IntegrityError("free and cached pages are not exactly the pages that no sequence holds")
        if any(map(self._key_of.__getitem__, self._free)):
            raise IntegrityError("a free page still has a key")
        if not all(map(self._key_of.__getitem__, self._cached)):
            raise IntegrityError("a cached page has no key")
        keyed = self.pages - self._key_of.count(None)
        indexed = self._page_of.items()
        if len(indexed) != keyed or any(self._key_of[page] != key for key, page in indexed):
            raise IntegrityError("the index and the pages' keys differ")
