"""Checks of flash_attn_with_kvcache, flash_attn_combine and get_scheduler_metadata; see _checks.py for the rules."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _arguments as check
from flash_attn._checks import (
    DENSE_CACHE,
    DENSE_Q,
    PAGED_KV,
    VARLEN_Q,
    ForwardCall,
    Sequences,
    Shapes,
    check_qkv,
    finish_call,
)

_NAMES = ("q", "k_cache", "v_cache")


class Append(NamedTuple):
    """The append op's arguments, in its order."""

    k_cache: Tensor
    v_cache: Tensor
    k: Tensor
    v: Tensor
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_seqlens: Tensor
    cu_seqlens_k_new: Tensor | None
    cache_batch_idx: Tensor | None
    block_table: Tensor | None
    rotary_interleaved: bool


class KvCacheCall(NamedTuple):
    """What flash_attn_with_kvcache does, in this order: append, rotate q, attend.

    Where it appends, the lengths that `forward` attends to, its seqused_k, are those before: the append op returns the
    others.
    """

    forward: ForwardCall
    append: Append | None
    rotate_q: bool

    def rotary_arguments(self) -> tuple[Any, ...]:
        """The rotary op's arguments. Under a causal or local mask q's token i is i positions on."""
        forward, append = self.forward, self.append
        advance = forward.window_left >= 0 or forward.window_right >= 0
        return (
            forward.q, append.rotary_cos, append.rotary_sin, append.cache_seqlens, forward.cu_seqlens_q,
            append.rotary_interleaved, advance,
        )  # fmt: skip


def kvcache_call(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    rotary_interleaved: bool,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    scheduler_metadata: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
    return_softmax_lse: bool,
    s_aux: Tensor | None,
    out: Tensor | None,
    pack_gqa: bool | None,
) -> KvCacheCall:
    """The call of flash_attn_with_kvcache."""
    layout_q = DENSE_Q if cu_seqlens_q is None else VARLEN_Q
    shapes = check_qkv(q, k_cache, v_cache, _NAMES, layout_q, DENSE_CACHE if block_table is None else PAGED_KV)
    device = q.device
    batch = shapes[0][0] if cu_seqlens_q is None else _packed_batch(cu_seqlens_q, device)
    capacity = _check_places(device, batch, shapes[1], cache_batch_idx, cache_leftpad, block_table)
    if scheduler_metadata is not None:
        check.scheduler_metadata_of(scheduler_metadata, device, batch)
    check.require_bool("rotary_interleaved", rotary_interleaved)
    num_new = _check_new(q, shapes, k, v, batch, cu_seqlens_k_new)
    if num_new > capacity and cu_seqlens_k_new is None:
        raise ValueError(f"k must fit into the {capacity} tokens of an entry's cache, got {num_new} new tokens")
    _check_rotary(q, k, rotary_cos, rotary_sin)
    lengths = _lengths(device, cache_seqlens, batch, capacity, num_new if cu_seqlens_k_new is None else 0)
    append = None
    if k is not None:
        if cache_seqlens is None:
            raise ValueError("cache_seqlens must be given with k (it says where k goes), got None")
        check.require_no_overlap("k_cache", k_cache.stride(), shapes[1])
        check.require_no_overlap("v_cache", v_cache.stride(), shapes[2])
        check.require_no_negative_view("k_cache", k_cache)
        check.require_no_negative_view("v_cache", v_cache)
        _require_no_gradient(k_cache, v_cache, k, v, rotary_cos, rotary_sin)
        append = Append(
            k_cache, v_cache, k, v, rotary_cos, rotary_sin, lengths, cu_seqlens_k_new, cache_batch_idx, block_table,
            rotary_interleaved,
        )  # fmt: skip
    elif lengths is None and block_table is not None:
        lengths = torch.full((batch,), capacity, dtype=torch.int32, device=device)
    longest_q = 0 if max_seqlen_q is None else check.max_seqlen_of("max_seqlen_q", max_seqlen_q)
    sequences = Sequences(
        cu_seqlens_q, None, None, lengths, cache_leftpad, block_table, cache_batch_idx, scheduler_metadata, longest_q, 0
    )
    more = () if append is None else ("append",) if rotary_cos is None else ("append", "rotary")
    forward = finish_call(
        q, k_cache, v_cache, shapes, sequences, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, s_aux=s_aux, out=out, return_softmax_lse=return_softmax_lse,
        num_splits=num_splits, pack_gqa=pack_gqa, more_features=more,
    )  # fmt: skip
    return KvCacheCall(forward, append, rotary_cos is not None)


def _packed_batch(cu_seqlens_q: Tensor, device: torch.device) -> int:
    size = check.int32_vector("cu_seqlens_q", cu_seqlens_q, device, None, "(batch + 1,)")
    if size < 1:
        raise ValueError("cu_seqlens_q must have batch + 1 elements, at least one, got none")
    return size - 1


def _check_places(
    device: torch.device,
    batch: int,
    shape_k: torch.Size,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> int:
    """Checks where the entries lie in the cache and returns how many tokens each can hold."""
    if cache_batch_idx is not None:
        check.int32_vector("cache_batch_idx", cache_batch_idx, device, batch, "(batch,)")
    if cache_leftpad is not None:
        check.int32_vector("cache_leftpad", cache_leftpad, device, batch, "(batch,)")
    if block_table is not None:
        check.require_page_size("k_cache", shape_k)
        # With cache_batch_idx the table may have more rows than the batch: it chooses among them.
        return check.block_table_of(block_table, device, batch if cache_batch_idx is None else None) * shape_k[1]
    if cache_batch_idx is None and shape_k[0] != batch:
        raise ValueError(
            f"k_cache must have q's batch size {batch} when cache_batch_idx is not given, got shape {tuple(shape_k)}"
        )
    return shape_k[1]


def _check_new(
    q: Tensor,
    shapes: Shapes,
    k: Tensor | None,
    v: Tensor | None,
    batch: int,
    cu_seqlens_k_new: Tensor | None,
) -> int:
    """Checks the new keys and values; returns their tokens per entry, or of all entries with cu_seqlens_k_new."""
    if k is None:
        for name, value in (("v", v), ("cu_seqlens_k_new", cu_seqlens_k_new)):
            if value is not None:
                raise ValueError(f"{name} must not be given without k, got a {type(value).__name__}")
        return 0
    if v is None:
        raise ValueError("v must be given with k, got None")
    if cu_seqlens_k_new is not None:
        check.int32_vector("cu_seqlens_k_new", cu_seqlens_k_new, q.device, batch + 1, "(batch + 1,)")
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        check.require_tensor("k", k)
        check.require_tensor("v", v)
    check.require_strided("k", k)
    check.require_strided("v", v)
    device, dtype, shape_k, shape_v = q.device, q.dtype, k.shape, v.shape
    packed = cu_seqlens_k_new is not None
    row_dim = 0 if packed else 1
    tokens = shape_k[row_dim] if len(shape_k) > row_dim else 0
    leading = (tokens,) if packed else (batch, tokens)
    _, cached_k, cached_v = shapes
    right_shapes = shape_k == (*leading, cached_k[2], cached_k[3]) and shape_v == (*leading, cached_v[2], cached_v[3])
    if right_shapes and k.dtype == dtype and v.dtype == dtype and k.device == device and v.device == device:
        return tokens
    layout = "total_k_new" if packed else "batch, seqlen_new"
    for name, tensor, cached, dim in (("k", k, cached_k, "head_dim"), ("v", v, cached_v, "head_dim_v")):
        check.require_device(name, tensor, device)
        check.require_dtype(name, tensor, dtype, "q's ")
        check.require_rank(name, tensor, f"({layout}, num_heads_k, {dim})")
        check.require_shape(name, tensor, (*leading, *cached[-2:]), f"({layout}, num_heads_k, {dim})")
    return tokens


def _check_rotary(q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        given, missing = ("rotary_sin", "rotary_cos") if cos is None else ("rotary_cos", "rotary_sin")
        raise ValueError(f"{missing} must be given with {given}, got None")
    if k is None:
        raise ValueError("rotary_cos must not be given without k and v, got a Tensor")
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        check.require_tensor(name, tensor)
        check.require_strided(name, tensor)
        check.require_device(name, tensor, q.device)
        check.require_dtype(name, tensor, q.dtype, "q's ")
        check.require_rank(name, tensor, "(seqlen_rotary, rotary_dim / 2)")
    check.require_shape("rotary_sin", sin, tuple(cos.shape), "rotary_cos's")
    rotary_dim, head_dim = 2 * cos.shape[1], q.shape[-1]
    if rotary_dim % 16 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_cos must have rotary_dim / 2 columns, rotary_dim a multiple of 16 up to head_dim {head_dim}, "
            f"got rotary_dim {rotary_dim}"
        )


def _lengths(device: torch.device, cache_seqlens: Any, batch: int, capacity: int, num_new: int) -> Tensor | None:
    """cache_seqlens as an int32 tensor; its values are checked only where the host has them."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, Tensor):
        check.int32_vector("cache_seqlens", cache_seqlens, device, batch, "(batch,)")
        return cache_seqlens
    length = check.as_int("cache_seqlens", cache_seqlens)
    if not 0 <= length <= capacity - num_new:
        raise ValueError(
            f"cache_seqlens must be at least 0 and leave room for the {num_new} new tokens in a cache of {capacity}, "
            f"got {length}"
        )
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def _require_no_gradient(*tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for index, tensor in enumerate(tensors):
        if tensor is not None and tensor.requires_grad:
            name = ("k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin")[index]
            raise NotImplementedError(
                f"{name} must not require grad when k is appended (the cache is written in place and no gradient "
                f"flows through it); call under torch.no_grad(), got requires_grad=True"
            )


def check_combine(out_partial: Any, lse_partial: Any, out: Any, out_dtype: Any) -> None:
    """Arguments of flash_attn_combine."""
    check.require_tensor("out_partial", out_partial)
    check.require_tensor("lse_partial", lse_partial)
    check.require_strided("out_partial", out_partial)
    check.require_strided("lse_partial", lse_partial)
    device = out_partial.device
    check.require_device("lse_partial", lse_partial, device, "out_partial's")
    check.require_float_dtype("out_partial", out_partial)
    lse_dtype = torch.float64 if out_partial.dtype == torch.float64 else torch.float32
    check.require_dtype("lse_partial", lse_partial, lse_dtype)
    if out_partial.ndim not in (4, 5):
        raise ValueError(
            "out_partial must have the shape (num_splits, batch, seqlen, num_heads, head_dim) or "
            f"(num_splits, total_q, num_heads, head_dim), got {tuple(out_partial.shape)}"
        )
    check.require_shape("lse_partial", lse_partial, tuple(out_partial.shape[:-1]), "out_partial's but for head_dim")
    if out_dtype is not None and out_dtype not in check.DTYPES:
        raise ValueError(f"out_dtype must be float16, bfloat16, float32 or float64, got {out_dtype!r}")
    if out is None:
        return
    check.require_tensor("out", out)
    check.require_strided("out", out)
    check.require_device("out", out, device, "out_partial's")
    if out_dtype is not None:
        check.require_dtype("out", out, out_dtype, "out_dtype's ")
    check.require_float_dtype("out", out)
    check.require_shape("out", out, tuple(out_partial.shape[1:]), "out_partial's without num_splits")
    check.require_no_overlap("out", out.stride(), out.shape)
    if torch.is_grad_enabled() and (out.requires_grad or out_partial.requires_grad or lse_partial.requires_grad):
        raise ValueError("out must not be given when a gradient is needed; got tensors with requires_grad=True")


def check_scheduler_metadata(
    batch_size: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    num_heads_q: Any,
    num_heads_kv: Any,
    headdim: Any,
    cache_seqlens: Any,
    qkv_dtype: Any,
    headdim_v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k_new: Any,
    cache_leftpad: Any,
    page_size: Any,
    max_seqlen_k_new: Any,
    causal: Any,
    window_size: Any,
    attention_chunk: Any,
    has_softcap: Any,
    num_splits: Any,
    pack_gqa: Any,
    sm_margin: Any,
) -> tuple[int, dict[str, Any]]:
    """Arguments of get_scheduler_metadata; returns the longest new length and what _schedule.Step is to hold of them,
    but for tensors."""
    batch_size = check.size_of("batch_size", batch_size, 0)
    heads, heads_kv = check.size_of("num_heads_q", num_heads_q, 1), check.size_of("num_heads_kv", num_heads_kv, 1)
    if heads % heads_kv:
        raise ValueError(f"num_heads_q must be a multiple of num_heads_kv {heads_kv}, got {heads}")
    headdim = check.size_of("headdim", headdim, 1, check.MAX_HEAD_DIM)
    headdim_v = check.size_of("headdim_v", headdim if headdim_v is None else headdim_v, 1, check.MAX_HEAD_DIM_V)
    if qkv_dtype not in check.DTYPES:
        raise ValueError(f"qkv_dtype must be float16, bfloat16, float32 or float64, got {qkv_dtype!r}")
    longest_q = check.max_seqlen_of("max_seqlen_q", max_seqlen_q)
    longest_k = check.max_seqlen_of("max_seqlen_k", max_seqlen_k)
    longest_new = check.max_seqlen_of("max_seqlen_k_new", max_seqlen_k_new)
    check.require_tensor("cache_seqlens", cache_seqlens)
    device = cache_seqlens.device
    for name, tensor, size, layout in (
        ("cache_seqlens", cache_seqlens, batch_size, "(batch_size,)"),
        ("cu_seqlens_q", cu_seqlens_q, batch_size + 1, "(batch_size + 1,)"),
        ("cu_seqlens_k_new", cu_seqlens_k_new, batch_size + 1, "(batch_size + 1,)"),
        ("cache_leftpad", cache_leftpad, batch_size, "(batch_size,)"),
    ):
        if tensor is not None:
            check.int32_vector(name, tensor, device, size, layout, "cache_seqlens's")
    window_left, window_right = check.window_of(window_size, causal)
    check.require_bool("has_softcap", has_softcap)
    for name, value in (("attention_chunk", attention_chunk), ("sm_margin", sm_margin)):
        if check.as_int(name, value) != 0:
            raise NotImplementedError(f"{name} must be 0 (nothing else is supported yet), got {value}")
    return longest_new, {
        "num_heads": heads,
        "num_heads_k": heads_kv,
        "head_dim": headdim,
        "head_dim_v": headdim_v,
        "dtype": qkv_dtype,
        "longest_q": longest_q,
        "longest_k": longest_k,
        "page_size": None if page_size is None else check.size_of("page_size", page_size, 1),
        "window_left": window_left,
        "window_right": window_right,
        "has_softcap": has_softcap,
        "num_splits": check.num_splits_of(num_splits),
        "pack_gqa": check.pack_gqa_of(pack_gqa),
    }
