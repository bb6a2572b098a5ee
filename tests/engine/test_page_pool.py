"""The page allocator against a model of it that is too simple to be wrong."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.engine.page_pool import IntegrityError, PagePool

PAGES = 9


class PoolMachine(RuleBasedStateMachine):
    """Random use of a small pool; every holder's pages are known, so the bookkeeping can be checked."""

    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.held: list[list[int]] = []
        self.keyed: dict[int, bytes] = {}

    @rule(target=holdings, count=st.integers(0, PAGES))
    def allocate(self, count: int) -> list[int]:
        available = self.pool.available
        pages = self.pool.allocate(count)
        if count > available:
            assert pages is None
            assert self.pool.available == available
            pages = []
        else:
            assert pages is not None
            assert len(set(pages)) == count
            assert not set(pages) & {page for other in self.held for page in other}
            for page in pages:
                self.keyed.pop(page, None)
        self.held.append(pages)
        return pages

    @rule(target=holdings, pages=holdings)
    def share(self, pages: list[int]) -> list[int]:
        if not any(pages is other for other in self.held):
            return []
        self.pool.hold(pages)
        copy = list(pages)
        self.held.append(copy)
        return copy

    @rule(pages=consumes(holdings))
    def release(self, pages: list[int]) -> None:
        if any(pages is other for other in self.held):
            self.held = [other for other in self.held if other is not pages]
            self.pool.release(pages)

    @rule(pages=holdings, key=st.binary(min_size=1, max_size=1))
    def publish(self, pages: list[int], key: bytes) -> None:
        if pages and any(pages is other for other in self.held):
            (known,) = self.pool.find([key])
            self.pool.publish(pages[0], key)
            if not known and self.keyed.setdefault(pages[0], key) == key:
                known = pages[0]
            assert self.pool.find([key]) == [known]

    @rule(target=holdings, key=st.binary(min_size=1, max_size=1))
    def adopt(self, key: bytes) -> list[int]:
        found = self.pool.find([key])
        self.pool.hold(found)
        pages = [page for page in found if page]
        self.held.append(pages)
        return pages

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity(self.held)
        assert self.pool.held == len({page for pages in self.held for page in pages})
        assert self.pool.held + self.pool.available == self.pool.total == PAGES - 1


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_eviction_takes_the_least_recently_used_and_the_tail_of_a_prompt_first() -> None:
    pool = PagePool(5)
    old, new = pool.allocate(2), pool.allocate(2)
    for pages, name in ((old, b"old"), (new, b"new")):
        for index, page in enumerate(pages):
            pool.publish(page, name + bytes([index]))
        pool.release(pages)
    assert pool.allocate(1) == [old[1]]
    assert pool.find([b"old\0", b"old\1"]) == [old[0], 0]
    assert pool.find([b"new\0", b"new\1"]) == new


@pytest.mark.parametrize("damage", ["leak", "double release", "phantom key", "free and held"])
def test_integrity_check_finds_damage(damage: str) -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    holdings = [pages]
    if damage == "leak":
        holdings = [pages[:1]]
    elif damage == "double release":
        pool.release(pages[:1])
    elif damage == "phantom key":
        pool._page_of[b"x"] = pages[0]
    else:
        pool._free.append(pages[0])
    with pytest.raises(IntegrityError):
        pool.check_integrity(holdings)


def test_releasing_too_often_is_noticed() -> None:
    pool = PagePool(3)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(IntegrityError, match="released more often"):
        pool.release(pages)
