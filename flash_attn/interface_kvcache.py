"""The public functions for inference: the KV cache, combining partial results, the scheduler's metadata."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _schedule
from flash_attn._checks import Window
from flash_attn._checks_kvcache import check_combine, check_scheduler_metadata, kvcache_call
from flash_attn._run import Result, run_combine, run_kvcache


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    pack_gqa: bool | None = None,
) -> Result:
    """Attention of new queries to a KV cache. If k and v are given, first appends them to the cache, in place.

    Entry b then has the keys from cache_leftpad[b] up to, not including, cache_seqlens[b] plus its new tokens. No
    call waits for a GPU. The kernels don't copy the cache, unless its rows can't be read in pieces of 16 bytes
    (head_dim or a stride of 16-bit elements is no multiple of 8).

    Parameters
    ----------
    q : Tensor, (batch, seqlen_q, num_heads, head_dim)
        (total_q, num_heads, head_dim) with cu_seqlens_q.
    k_cache : Tensor, (batch_cache, seqlen_cache, num_heads_k, head_dim)
        (num_pages, page_size, num_heads_k, head_dim) with block_table. Without either of cache_batch_idx and
        block_table, batch_cache is batch. With k, it must not overlap itself.
    v_cache : Tensor, as k_cache, with head_dim_v
    k, v : Tensor, (batch, seqlen_new, num_heads_k, head_dim or head_dim_v), optional
        (total_k_new, num_heads_k, head_dim or head_dim_v) with cu_seqlens_k_new.
        New tokens, in memory of their own, not the cache's. Token t of entry b goes to position cache_seqlens[b] + t,
        which must exist in the cache.
    rotary_cos, rotary_sin : Tensor, (seqlen_rotary, rotary_dim / 2), q's dtype, optional
        Rotary embedding (RoPE) of q, and of k before it is stored; it needs k and v. rotary_dim is a multiple of
        16 up to head_dim, and seqlen_rotary covers every position used. New key t of entry b is at position
        cache_seqlens[b] + t. Query i is at cache_seqlens[b] + i with a causal mask or a finite window, and at
        cache_seqlens[b] otherwise. Computed in float32 (float64 for float64 inputs), rounded to q's dtype.
    cache_seqlens : int or Tensor, (batch,), int32, optional
        Tokens in each entry's cache before the append, left padding included. None means the whole cache, and
        isn't allowed with k. -1 with one new token marks an idle entry of a padded batch: nothing is stored for
        it, and its out is 0.
    cache_batch_idx : Tensor, (batch,), int32, optional
        The row of the cache, or of block_table, that each entry uses. If k is given, no row may occur twice.
    cache_leftpad : Tensor, (batch,), int32, optional
        How many tokens at the start of each entry's cache to leave out.
    block_table : Tensor, (batch, max_pages), int32, optional
        Token t of entry b is row t % page_size of page block_table[b, t // page_size]. page_size may be any from
        1. Pages that hold no key which a query sees (past the last key, or before the window) may have any id and
        contents.
    softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, num_splits, pack_gqa
        As in `flash_attn_func`; an entry's seqlen_k is the number of its keys.
    rotary_interleaved : bool
        Rotate the pairs (0, 1), (2, 3), ...; if False, (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
    return_softmax_lse : bool
        Return (out, lse).
    out : Tensor, q's shape with head_dim_v, optional
        As in `flash_attn_func`; it must not overlap the cache either.
    cu_seqlens_q, cu_seqlens_k_new : Tensor, (batch + 1,), int32, optional
        Where each entry starts in a packed q, and in packed k and v, and where the last one ends.
    max_seqlen_q : int, integer Tensor of one element or None
        The largest number of queries of an entry: a hint, as in `flash_attn_varlen_func`.
    scheduler_metadata : Tensor, (at least 1 + batch,), int32, optional
        What `get_scheduler_metadata` returned: a hint, which changes no result.

    Returns
    -------
    out : Tensor, q's shape with head_dim_v, q's dtype
    lse : Tensor, (batch, num_heads, seqlen_q) or (num_heads, total_q), float32 (float64 for float64 inputs)
        With return_softmax_lse.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or breaks one of the rules above.
    NotImplementedError
        If no path serves this call, or if a tensor that the append reads or writes requires grad, since that
        gradient would be lost. q may require grad, but with rotary embedding, block_table, cache_leftpad or
        cache_batch_idx its backward pass raises.

    References
    ----------
    RoPE (Su et al. 2021, arXiv:2104.09864), paged KV caches (Kwon et al. 2023, arXiv:2309.06180), and those of
    `flash_attn_func`.
    """
    call = kvcache_call(
        q, k_cache, v_cache, k, v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, block_table=block_table,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        rotary_interleaved=rotary_interleaved, alibi_slopes=alibi_slopes, num_splits=num_splits,
        return_softmax_lse=return_softmax_lse, s_aux=s_aux, out=out, cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q, cu_seqlens_k_new=cu_seqlens_k_new, scheduler_metadata=scheduler_metadata,
        pack_gqa=pack_gqa,
    )  # fmt: skip
    return run_kvcache(call)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges the results of attention to disjoint sets of keys, the parts.

    lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) * out_i, over the parts i.

    Parameters
    ----------
    out_partial : Tensor, (num_splits, batch, seqlen, num_heads, head_dim)
        Or (num_splits, total_q, num_heads, head_dim); float16, bfloat16, float32 or float64.
    lse_partial : Tensor, out_partial's shape without head_dim, float32, float64 for a float64 out_partial
        Natural logarithms. -inf says that a row saw no key of a part; that row of out_partial isn't used then.
    out : Tensor, out_partial's shape without num_splits, optional
        Receives the result. It must not overlap itself, and can't be given when a gradient is needed.
    out_dtype : torch.dtype, optional
        The result's dtype; None means out's if that is given, else out_partial's.

    Returns
    -------
    out : Tensor, (batch, seqlen, num_heads, head_dim) or (total_q, num_heads, head_dim)
    lse : Tensor, (batch, seqlen, num_heads) or (total_q, num_heads), lse_partial's dtype

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or breaks one of the rules above.
    NotImplementedError
        In the backward pass: there is none.

    References
    ----------
    Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).
    """
    check_combine(out_partial, lse_partial, out, out_dtype)
    if out is None:
        return run_combine(out_partial, lse_partial, out_dtype)
    result, lse = run_combine(out_partial, lse_partial, out.dtype)
    return out.copy_(result), lse


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int | Tensor = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """A schedule for the argument `scheduler_metadata`, which all layers of a decoding step can share.

    It is a hint: no result depends on it, whatever it holds. Its size depends on batch_size alone, so that a CUDA
    graph can keep it. The kernels derive the same numbers from the lengths themselves, in less time than it would
    take to read them. So you don't need it: it is here for programs written for other packages, and to show how
    many parts a step will have. On a GPU torch.compile runs it outside of its graphs, and refuses it with
    fullgraph=True.

    Parameters
    ----------
    batch_size : int
    max_seqlen_q, max_seqlen_k, max_seqlen_k_new : int, integer Tensor of one element or None
        The largest number of queries, of keys in the cache and of new keys of an entry. For the first two None
        means unknown.
    num_heads_q, num_heads_kv : int
    headdim, headdim_v : int
        From 1 to 576 and from 1 to 512; headdim_v is headdim if None.
    cache_seqlens : Tensor, (batch_size,), int32
        As in `flash_attn_with_kvcache`. The result is on the same device.
    qkv_dtype : torch.dtype
    cu_seqlens_q, cu_seqlens_k_new : Tensor, (batch_size + 1,), int32, optional
    cache_leftpad : Tensor, (batch_size,), int32, optional
    page_size : int, optional
    causal, window_size, num_splits, pack_gqa
        As in `flash_attn_func`.
    has_softcap : bool
    attention_chunk, sm_margin : int
        Must be 0; anything else raises NotImplementedError.

    Returns
    -------
    Tensor, (1 + 4 * batch_size rounded up to 4,), int32
        Element 0 is a semaphore, which is 0 between calls. Elements 1 to batch_size are the number of parts of
        each entry. The others are 0.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        If an argument has the wrong type, breaks one of the rules above or isn't supported.
    """
    longest_new, options = check_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype,
        headdim_v, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new, causal, window_size,
        attention_chunk, has_softcap, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip
    lengths = cache_seqlens + (longest_new if cu_seqlens_k_new is None else cu_seqlens_k_new.diff())
    return _schedule.scheduler_metadata(
        _schedule.Step(seqlens_k=lengths, cu_seqlens_q=cu_seqlens_q, leftpad=cache_leftpad, **options)
    )
