"""Stand in for torch's ``varlen_attn`` as it was in 2.11 and has been since 2.12, on CUDA."""

import torch

from tests.attention.doubles.semantics import attend, check_lengths, check_starts, check_tensors, from_pages


def since_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa
    if block_table is None:
        assert seqused_k is None
        return in_2_11(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
        )
    check_tensors(query, key, value)
    assert key.shape[1] % 256 == 0
    starts = check_starts(cu_seq_q, max_q, len(query))
    lengths = check_lengths(seqused_k, len(block_table))
    assert max(lengths) == max_k
    assert cu_seq_k.diff().tolist() == lengths
    output = torch.empty_like(query)
    for b, length in enumerate(lengths):
        rows = slice(starts[b], starts[b + 1])
        keys, values = (from_pages(pages, block_table[b], length) for pages in (key, value))
        output[rows] = attend(query[rows], keys, values, scale, False, window_size)
    return output


def in_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    check_tensors(query, key, value)
    starts = check_starts(cu_seq_q, max_q, len(query))
    key_starts = check_starts(cu_seq_k, max_k, len(key))
    assert len(starts) == len(key_starts)
    output = torch.empty_like(query)
    for b in range(len(starts) - 1):
        rows, tokens = slice(*starts[b : b + 2]), slice(*key_starts[b : b + 2])
        output[rows] = attend(query[rows], key[tokens], value[tokens], scale, False, window_size)
    return output
