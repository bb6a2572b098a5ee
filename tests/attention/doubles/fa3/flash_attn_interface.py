"""Stands in for FlashAttention-3: its one function that reads pages."""

import torch

from tests.attention.doubles.semantics import attend, check_lengths, check_starts, check_tensors, from_pages


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    check_tensors(q, k_cache, v_cache)
    starts = check_starts(cu_seqlens_q, max_seqlen_q, len(q))
    output = torch.empty_like(q)
    for b, length in enumerate(check_lengths(cache_seqlens, len(page_table))):
        rows = slice(starts[b], starts[b + 1])
        keys, values = (from_pages(pages, page_table[b], length) for pages in (k_cache, v_cache))
        output[rows] = attend(q[rows], keys, values, softmax_scale, causal, window_size, softcap)
    return output
