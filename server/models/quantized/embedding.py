"""A table of embeddings of few bits on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from server.models.quantized.native import look_up
from server.models.quantized.packing import COLUMNS, Bits, Packed, pack_exactly
from server.models.quantized.workspace import Workspace


class QuantizedEmbedding(nn.Module):
    """Rows of packed weights, unpacked when they are looked up.

    Args:
        packed: the table, which must be exact. It may be the output layer's own, which costs no memory.
        tokens: number of rows.
        size: numbers in a row.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, packed: Packed, tokens: int, size: int) -> None:
        super().__init__()
        assert packed.exact
        self.num_embeddings, self.embedding_dim, self.bits = tokens, size, packed.bits
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self._workspace = Workspace()

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return (self.codes[0].nbytes + self.scales[0].nbytes) // COLUMNS

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integers ``[T]`` to float32 ``[T, size]``, good until the next call.

        Raises:
            IndexError: the table has no such row.
        """
        rows = self._workspace.rows(len(ids), self.embedding_dim)
        look_up(ids, self.bits, self.codes, self.scales, rows, self.num_embeddings)
        return rows


def packed_embedding(plain: nn.Embedding, head: Packed) -> nn.Module:
    """The same table in few bits, if that loses nothing, else as it is.

    Args:
        plain: the table.
        head: the output layer's weights, whose memory is used where they are the same.
    """
    weight = plain.weight
    forms: tuple[Bits, Bits] = (4, 8) if head.bits == 4 else (8, 4)
    for bits in forms:
        if (packed := pack_exactly(weight, bits)) is not None:
            if _same(packed, head):
                packed = head
            return QuantizedEmbedding(packed, plain.num_embeddings, plain.embedding_dim)
    return plain


def _same(one: Packed, other: Packed) -> bool:
    return (
        one.bits == other.bits
        and torch.equal(one.codes, other.codes)
        and torch.equal(one.scales, other.scales)
    )
