"""Which prompts' pages can be found in an engine's cache: events, in the form of vLLM's.

They cross the link to the server process as part of a step's output, and go to routers.
"""

from __future__ import annotations

import msgspec


class BlockStored(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Pages have become findable, one behind another.

    Attributes:
        block_hashes: their names; equal ones mean equal prefixes of one identity.
        parent_block_hash: that of the page before the first of them, if there is one.
        token_ids: of all of them.
        block_size: tokens of a page.
        lora_id: none here.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None


class BlockRemoved(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Pages can't be found any more."""

    block_hashes: list[int]


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """No page can be found: the engine has started.

    A subscriber whose connection comes after it sees only that numbers begin anew, and asks for a replay.
    """


Event = BlockStored | BlockRemoved | AllBlocksCleared


def name_of(key: bytes) -> int:
    """A page's name in events: 64 bits of its key."""
    return int.from_bytes(key[:8], "big")
