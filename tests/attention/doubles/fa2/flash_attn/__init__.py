"""Stands in for flash-attn 2.8.3: its two functions that read pages."""

import torch

from tests.attention.doubles.semantics import attend, check_lengths, check_starts, check_tensors, from_pages


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    check_tensors(q, k, v)
    assert k.shape[1] % 256 == 0
    starts = check_starts(cu_seqlens_q, max_seqlen_q, len(q))
    assert cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_k.diff().tolist()
    assert max(lengths) == max_seqlen_k
    assert len(block_table) == len(lengths) == len(starts) - 1
    output = torch.empty_like(q)
    for b, length in enumerate(lengths):
        rows = slice(starts[b], starts[b + 1])
        keys, values = (from_pages(pages, block_table[b], length) for pages in (k, v))
        output[rows] = attend(q[rows], keys, values, softmax_scale, causal, window_size, softcap)
    return output


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    check_tensors(q, k_cache, v_cache)
    assert k_cache.shape[1] % 256 == 0
    assert len(block_table) == len(q)
    output = torch.empty_like(q)
    for b, length in enumerate(check_lengths(cache_seqlens, len(q))):
        keys, values = (from_pages(pages, block_table[b], length) for pages in (k_cache, v_cache))
        output[b] = attend(q[b], keys, values, softmax_scale, causal, window_size, softcap)
    return output
