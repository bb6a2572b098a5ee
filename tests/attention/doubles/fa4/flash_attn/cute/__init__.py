"""Stands in for flash-attn-4 4.0.0b36: its one function that reads pages."""

import torch

from tests.attention.doubles.semantics import attend, check_lengths, check_starts, check_tensors, from_pages


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    check_tensors(q, k, v)
    assert cu_seqlens_k is None
    starts = check_starts(cu_seqlens_q, max_seqlen_q, len(q))
    lengths = check_lengths(seqused_k, len(page_table))
    assert max(lengths) == max_seqlen_k
    output = torch.empty_like(q)
    for b, length in enumerate(lengths):
        rows = slice(starts[b], starts[b + 1])
        keys, values = (from_pages(pages, page_table[b], length) for pages in (k, v))
        output[rows] = attend(
            q[rows], keys, values, softmax_scale, causal, window_size, softcap, learnable_sink
        )
    return output, None
