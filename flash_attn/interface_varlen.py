"""The public functions for sequences of different lengths, packed one after another."""

from __future__ import annotations

from torch import Tensor

from flash_attn import _checks, _checks_packed
from flash_attn._checks import Window
from flash_attn._run import Result, run


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
) -> Result:
    """Attention within each sequence of a packed batch, with packed or paged keys.

    Sequence b has the queries from cu_seqlens_q[b] up to, not including, cu_seqlens_q[b + 1], and likewise for
    keys. Lengths are read on the device, so no call waits for it.

    Parameters
    ----------
    q : Tensor, (total_q, num_heads, head_dim)
    k : Tensor, (total_k, num_heads_k, head_dim)
        (num_pages, page_size, num_heads_k, head_dim) with block_table.
    v : Tensor, as k, with head_dim_v
    cu_seqlens_q : Tensor, (batch + 1,), int32
        Where each sequence starts in q, and where the last one ends. It begins with 0, does not decrease, and
        ends at or below total_q. Rows past the last sequence get out 0, lse -inf and gradients of 0.
    cu_seqlens_k : Tensor, (batch + 1,), int32, optional
        The same for k. With block_table it only gives the lengths. It may be None if both block_table and
        seqused_k are given, since then seqused_k gives them.
    max_seqlen_q, max_seqlen_k : int, integer Tensor of one element or None
        The lengths of the longest sequences, below 2**31: hints, which change no result. None means unknown, as do
        a tensor on a GPU and, inside torch.compile, any tensor. With return_attn_probs and dropout they are S_dmask's
        lengths, and no sequence may be longer.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`, with each sequence's own lengths.
    block_table : Tensor, (batch, max_pages), int32, optional
        Key t of sequence b is row t % page_size of page block_table[b, t // page_size]. Pages that hold no key
        which a query sees (past the last key, or before the window) may have any id and contents.
    seqused_q, seqused_k : Tensor, (batch,), int32, optional
        How many tokens of each sequence are used, from its start. Unused memory may hold anything, and rows of
        out past seqused_q are 0, with lse -inf.
    leftpad_k : Tensor, (batch,), int32, optional
        How many keys at the start of each sequence to leave out. Key 0 is then the first one after them.
    s_aux, return_softmax_lse, num_splits, pack_gqa
        As in `flash_attn_func`.
    out : Tensor, (total_q, num_heads, head_dim_v), optional
        As in `flash_attn_func`.
    scheduler_metadata : Tensor, (at least 1 + batch,), int32, optional
        What `get_scheduler_metadata` returned: a hint, which changes no result.

    Returns
    -------
    out : Tensor, (total_q, num_heads, head_dim_v), q's dtype
    lse : Tensor, (num_heads, total_q), float32 (float64 for float64 inputs)
        With return_softmax_lse or return_attn_probs.
    S_dmask : Tensor, (batch, num_heads, longest q, longest k), both lengths rounded up to a multiple of 128
        With return_attn_probs; empty if dropout_p is 0.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flash_attn_func`.

    There is no backward pass through block_table or leftpad_k: it raises NotImplementedError.
    """
    # Not through varlen_call, which would put the options into one more dict.
    shapes, sequences = _checks.varlen_sequences(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_q, seqused_k, leftpad_k,
        scheduler_metadata,
    )  # fmt: skip
    call = _checks.finish_call(
        q, k, v, shapes, sequences, dropout_p=dropout_p, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, return_attn_probs=return_attn_probs, s_aux=s_aux, out=out,
        return_softmax_lse=return_softmax_lse, num_splits=num_splits, pack_gqa=pack_gqa,
    )  # fmt: skip
    return run(call)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
) -> Result:
    """`flash_attn_varlen_func` with q, k and v in one tensor, whose gradient is one tensor too. Nothing is copied.

    Parameters
    ----------
    qkv : Tensor, (total, 3, num_heads, head_dim)
        q, k and v, stacked in this order.
    cu_seqlens : Tensor, (batch + 1,), int32
        Where each sequence starts, and where the last one ends.
    max_seqlen : int, integer Tensor of one element or None
        The length of the longest sequence: a hint, as in `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, ...
        All other parameters are `flash_attn_func`'s.

    Returns
    -------
    As `flash_attn_varlen_func`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flash_attn_func`.
    """
    call = _checks_packed.varlen_qkvpacked_call(
        qkv, cu_seqlens, max_seqlen, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
        return_attn_probs=return_attn_probs, s_aux=s_aux, out=out, return_softmax_lse=return_softmax_lse,
        num_splits=num_splits, pack_gqa=pack_gqa,
    )  # fmt: skip
    return run(call)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
) -> Result:
    """`flash_attn_varlen_func` with k and v in one tensor, whose gradient is one tensor too. Nothing is copied.

    Parameters
    ----------
    q : Tensor, (total_q, num_heads, head_dim)
    kv : Tensor, (total_k, 2, num_heads_k, head_dim)
        k and v, stacked in this order.
    cu_seqlens_q, cu_seqlens_k : Tensor, (batch + 1,), int32
        Where each sequence starts in q and in kv, and where the last one ends.
    max_seqlen_q, max_seqlen_k : int, integer Tensor of one element or None
        The lengths of the longest sequences: hints, as in `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, ...
        All other parameters are `flash_attn_func`'s.

    Returns
    -------
    As `flash_attn_varlen_func`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flash_attn_func`.
    """
    call = _checks_packed.varlen_kvpacked_call(
        q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=dropout_p,
        softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
        return_attn_probs=return_attn_probs, s_aux=s_aux, out=out, return_softmax_lse=return_softmax_lse,
        num_splits=num_splits, pack_gqa=pack_gqa,
    )  # fmt: skip
    return run(call)
