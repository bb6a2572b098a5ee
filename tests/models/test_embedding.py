"""Rows of a packed table of embeddings are the weights that its codes stand for."""

import dataclasses

import pytest
import torch

from server.models.quantized.embedding import QuantizedEmbedding
from server.models.quantized.packing import pack, unpack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (16, 32), (33, 40), (100, 576)])
def test_rows_are_the_unpacked_weights(bits, tokens, size):
    generator = torch.Generator().manual_seed(tokens)
    weights = unpack(pack(torch.randn(tokens, size, generator=generator), bits), tokens, size)
    table = QuantizedEmbedding(dataclasses.replace(pack(weights, bits), exact=True), tokens, size)
    ids = torch.randint(tokens, (3, 2), generator=generator)[:, 0]  # not contiguous
    assert torch.equal(table(ids), weights[ids])
    assert table(ids[:0]).shape == (0, size)


@pytest.mark.parametrize("wrong", [-1, 33, 2**40])
def test_a_row_that_is_not_there_is_refused(wrong):
    table = QuantizedEmbedding(dataclasses.replace(pack(torch.ones(33, 32), 4), exact=True), 33, 32)
    with pytest.raises(IndexError, match="1 of 3 ids are none of the 33"):
        table(torch.tensor([0, wrong, 32]))
