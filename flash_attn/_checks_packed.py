"""Checks of the packed forms, which unbind to views (no copies) and go on as the separate ones do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn import _arguments as check
from flash_attn._checks import ForwardCall, VarlenNames, dense_call, varlen_call

_QKV_NAMES = ("qkv", "qkv", "qkv")
_KV_NAMES = ("q", "kv", "kv")
_VARLEN_QKV_NAMES = VarlenNames(_QKV_NAMES, ("cu_seqlens",) * 2, ("max_seqlen",) * 2, "qkv's")
_VARLEN_KV_NAMES = VarlenNames(_KV_NAMES)


def qkvpacked_call(qkv: Tensor, **options: Any) -> ForwardCall:
    q, k, v = _unbind("qkv", qkv, 3, "(batch, seqlen, 3, num_heads, head_dim)")
    return dense_call(q, k, v, names=_QKV_NAMES, **options)


def kvpacked_call(q: Tensor, kv: Tensor, **options: Any) -> ForwardCall:
    k, v = _unbind("kv", kv, 2, "(batch, seqlen_k, 2, num_heads_k, head_dim)")
    return dense_call(q, k, v, names=_KV_NAMES, **options)


def varlen_qkvpacked_call(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: Any, **options: Any) -> ForwardCall:
    q, k, v = _unbind("qkv", qkv, 3, "(total, 3, num_heads, head_dim)")
    return varlen_call(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, names=_VARLEN_QKV_NAMES, **options)


def varlen_kvpacked_call(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    **options: Any,
) -> ForwardCall:
    k, v = _unbind("kv", kv, 2, "(total_k, 2, num_heads_k, head_dim)")
    return varlen_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, names=_VARLEN_KV_NAMES, **options
    )


def _unbind(name: str, packed: Any, parts: int, layout: str) -> tuple[Tensor, ...]:
    """The views of q, k, v or k, v. Their gradients come back in one stack, which is the packed gradient."""
    check.require_tensor(name, packed)
    check.require_strided(name, packed)
    check.require_float_dtype(name, packed)
    check.require_rank(name, packed, layout)
    if packed.shape[-3] != parts:
        raise ValueError(f"{name} must have the shape {layout}, got {tuple(packed.shape)}")
    return packed.unbind(-3)
