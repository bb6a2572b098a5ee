"""A window of blocks, global blocks, and random ones."""

from __future__ import annotations

from typing import ClassVar

import torch

from attention.patterns.declared import BIGBIRD
from attention.patterns.options import NumberedPattern, ranges

# Constants of the SplitMix64 generator (Steele et al., 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class BigBird(NumberedPattern):
    """Blocks near the query, the first block, and a few random blocks for each block of queries.

    Zaheer et al.: Big Bird, 2020, section 2, in causal form: the window is the query's own block and those
    before it, the first block is global, and random blocks are drawn from the earlier ones, for each block of
    queries anew, with replacement. The draw depends only on the seed and the block, so it is the same
    in every layer, chunk and run.

    Lossy, and any block may be drawn again later, so no page is freed.

    Args:
        block: tokens of a block; at least 1.
        window_blocks: blocks of the window, the query's own included; at least 1.
        random_blocks: draws for each block of queries.
        seed: of the draws.
        dense_layers: indices of layers that see every earlier token instead; with any, no page is freed.
    """

    name = "bigbird"
    numbers: ClassVar = BIGBIRD.numbers

    def __init__(
        self,
        block: int,
        window_blocks: int,
        random_blocks: int,
        seed: int,
        dense_layers: tuple[int, ...] = (),
    ) -> None:
        self.dense_layers = dense_layers
        self.block = block
        self.window_blocks = window_blocks
        self.random_blocks = random_blocks
        self.seed = seed

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.visible``."""
        query_blocks, key_blocks = query_positions // self.block, key_positions // self.block
        near = (key_blocks == 0) | (query_blocks - key_blocks < self.window_blocks)
        for draw in range(self.random_blocks):
            near = near | (key_blocks == self._drawn(query_blocks, draw))
        return near & (key_positions <= query_positions)

    def spans(self, positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.spans``; the first block, the drawn ones, then the window."""
        own = positions // self.block
        near = (own - self.window_blocks + 1).clamp(min=0)
        zero = torch.zeros_like(own)
        drawn = torch.stack([zero, *(self._drawn(own, draw) for draw in range(self.random_blocks))], dim=-1)
        drawn = drawn.sort(dim=-1).values
        again = (drawn >= near[:, None]) | (drawn == torch.nn.functional.pad(drawn[:, :-1], (1, 0), value=-1))
        begin = drawn * self.block
        blocks = torch.stack([begin, begin + self.block * ~again], dim=-1)
        return torch.cat([blocks, ranges((near * self.block, positions + 1))], dim=1)

    def expired(self, seq_len: int, page_size: int) -> range:
        """See ``Pattern.expired``; nothing ever expires."""
        return range(0)

    def _drawn(self, query_blocks: torch.Tensor, draw: int) -> torch.Tensor:
        """One of the blocks before each query's block, int64 of the same shape; its own for block 0."""
        # Products and sums wrap around, as the generator requires; shifts must not extend the sign.
        start = (self.seed * _MIX[1] + 2**63) % 2**64 - 2**63
        x = (query_blocks.long() * self.random_blocks + draw + 1) * _GAMMA + start
        for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        x = (x ^ ((x >> 31) & ((1 << 33) - 1))) & (2**63 - 1)
        return x % query_blocks.long().clamp(min=1)
