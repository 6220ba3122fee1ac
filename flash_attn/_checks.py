"""Turns the arguments of a public function into one checked, canonical `ForwardCall`.

Everything is checked once, here, in the order device, dtype, rank, shape, stride, meaning; the layers below
rely on it. No value of a CUDA tensor is read, so that nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _arguments as check

Window = tuple[int | None, int | None] | list[int | None] | Tensor

DENSE_Q = "(batch, seqlen_q, num_heads, head_dim)"
DENSE_KV = "(batch, seqlen_k, num_heads_k, head_dim)"
VARLEN_Q = "(total_q, num_heads, head_dim)"
VARLEN_KV = "(total_k, num_heads_k, head_dim)"
PAGED_KV = "(num_pages, page_size, num_heads_k, head_dim)"

DENSE_CACHE = "(batch_cache, seqlen_cache, num_heads_k, head_dim)"
_LAYOUTS = (DENSE_Q, DENSE_KV, VARLEN_Q, VARLEN_KV, PAGED_KV, DENSE_CACHE)
_RANKS = {layout: layout.count(",") + 1 for layout in _LAYOUTS}


class ForwardCall(NamedTuple):
    """The forward op's arguments, in the op's order, and what the caller of the op needs besides.

    Windows are canonical: -1 is infinite, and causal is `window_right == 0`. A max_seqlen of 0 is unknown or,
    for dense tensors, the tensor's own length.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor | None
    alibi_slopes: Tensor | None
    rng_state: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    block_table: Tensor | None
    cache_batch_idx: Tensor | None
    scheduler_metadata: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    num_splits: int
    pack_gqa: bool | None
    deterministic: bool
    # Not arguments of the op:
    features: frozenset[str]
    needs_grad: bool
    out: Tensor | None
    return_softmax_lse: bool
    return_attn_probs: bool

    @property
    def head_dim_v(self) -> int:
        return self.v.size(-1)  # which, unlike `shape`, makes no object of all sizes

    def op_arguments(self) -> tuple[Any, ...]:
        return self[:NUM_OP_ARGUMENTS]

    def with_seqused_k(self, seqused_k: Tensor) -> ForwardCall:
        """As _replace, in half its time: every step that appends does this."""
        return ForwardCall._make((*self[:_SEQUSED_K], seqused_k, *self[_SEQUSED_K + 1 :]))


_SEQUSED_K = ForwardCall._fields.index("seqused_k")
NUM_OP_ARGUMENTS = ForwardCall._fields.index("features")


class Sequences(NamedTuple):
    """Where the sequences lie in q, k and v, already checked."""

    batch: int
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    block_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    scheduler_metadata: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    def features(self) -> list[str]:
        found = ["dense" if self.cu_seqlens_q is None else "varlen"]
        if self.seqused_q is not None:
            found.append("seqused_q")
        if self.seqused_k is not None:
            found.append("seqused_k")
        if self.leftpad_k is not None:
            found.append("leftpad")
        if self.block_table is not None:
            found.append("paged")
        if self.cache_batch_idx is not None:
            found.append("cache_batch_idx")
        return found


def dense_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    names: tuple[str, str, str] = ("q", "k", "v"),
    **options: Any,
) -> ForwardCall:
    """The call of flash_attn_func; `options` are its other arguments, all of them."""
    return finish_call(q, k, v, dense_sequences(q, k, v, names), **options)


def dense_sequences(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")) -> Sequences:
    check_qkv(q, k, v, names, DENSE_Q, DENSE_KV)
    batch = q.size(0)
    if k.size(0) != batch:
        raise ValueError(f"{names[1]} must have q's batch size {batch}, got shape {tuple(k.shape)}")
    return Sequences(batch)


def varlen_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    *,
    block_table: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    names: tuple[str, str, str] = ("q", "k", "v"),
    cu_names: tuple[str, str] = ("cu_seqlens_q", "cu_seqlens_k"),
    max_names: tuple[str, str] = ("max_seqlen_q", "max_seqlen_k"),
    **options: Any,
) -> ForwardCall:
    """The call of flash_attn_varlen_func; `options` are the arguments that flash_attn_func has too."""
    check_qkv(q, k, v, names, VARLEN_Q, VARLEN_KV if block_table is None else PAGED_KV)
    device = q.device
    check.int32_vector(cu_names[0], cu_seqlens_q, device, None, "(batch + 1,)")
    batch = cu_seqlens_q.shape[0] - 1
    if batch < 0:
        raise ValueError(f"{cu_names[0]} must have batch + 1 elements, at least one, got none")
    for name, lengths in (("seqused_q", seqused_q), ("seqused_k", seqused_k), ("leftpad_k", leftpad_k)):
        if lengths is not None:
            check.int32_vector(name, lengths, device, batch, "(batch,)")
    if scheduler_metadata is not None:
        check.scheduler_metadata_of(scheduler_metadata, device, batch)
    if cu_seqlens_k is not None:
        check.int32_vector(cu_names[1], cu_seqlens_k, device, batch + 1, "(batch + 1,)")
    elif block_table is None:
        raise ValueError(f"{cu_names[1]} must be given when block_table is not, got None")
    elif seqused_k is None:
        raise ValueError(f"{cu_names[1]} must be given when seqused_k is not, got None for both")
    if block_table is not None:
        check.block_table_of(block_table, device, batch)
        # Pages have no slots in a packed tensor: below this line their lengths are seqused_k, and nothing
        # else.
        if seqused_k is None:
            seqused_k = cu_seqlens_k.diff()
        cu_seqlens_k = None
    sequences = Sequences(
        batch,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        leftpad_k,
        block_table,
        None,
        scheduler_metadata,
        check.max_seqlen_of(max_names[0], max_seqlen_q),
        check.max_seqlen_of(max_names[1], max_seqlen_k),
    )
    return finish_call(q, k, v, sequences, max_names=max_names, **options)


def check_qkv(q: Any, k: Any, v: Any, names: tuple[str, str, str], layout_q: str, layout_kv: str) -> None:
    """What q, k and v have to agree on in every layout."""
    name_q, name_k, name_v = names
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        check.require_tensor(name_q, q)
        check.require_tensor(name_k, k)
        check.require_tensor(name_v, v)
    device, dtype, shape_q, shape_k, shape_v = q.device, q.dtype, q.shape, k.shape, v.shape
    if k.device != device or v.device != device:
        check.require_device(name_k, k, device)
        check.require_device(name_v, v, device)
    if dtype not in check.DTYPES or k.dtype != dtype or v.dtype != dtype:
        check.require_float_dtype(name_q, q)
        check.require_dtype(name_k, k, dtype, "q's ")
        check.require_dtype(name_v, v, dtype, "q's ")
    rank_kv = _RANKS[layout_kv]
    if len(shape_q) != _RANKS[layout_q] or len(shape_k) != rank_kv or len(shape_v) != rank_kv:
        check.require_rank(name_q, q, layout_q)
        check.require_rank(name_k, k, layout_kv)
        check.require_rank(name_v, v, layout_kv.replace("head_dim)", "head_dim_v)"))
    num_heads, head_dim = shape_q[-2], shape_q[-1]
    num_heads_k, head_dim_v = shape_k[-2], shape_v[-1]
    if not 1 <= head_dim <= check.MAX_HEAD_DIM:
        raise ValueError(f"{name_q} must have a head_dim from 1 to {check.MAX_HEAD_DIM}, got {head_dim}")
    if shape_k[-1] != head_dim:
        raise ValueError(f"{name_k} must have q's head_dim {head_dim}, got shape {tuple(shape_k)}")
    if not 1 <= head_dim_v <= check.MAX_HEAD_DIM:
        raise ValueError(f"{name_v} must have a head_dim_v from 1 to {check.MAX_HEAD_DIM}, got {head_dim_v}")
    # In two steps, since a slice takes as long as ten such comparisons.
    if shape_v != shape_k and shape_v[:-1] != shape_k[:-1]:
        raise ValueError(
            f"{name_v} must have {name_k}'s shape {tuple(shape_k)} but for the last dimension, got {tuple(shape_v)}"
        )
    if num_heads_k < 1 or num_heads < 1 or num_heads % num_heads_k:
        raise ValueError(
            f"{name_q} must have a multiple of {name_k}'s num_heads_k heads, at least one, "
            f"got num_heads {num_heads} and num_heads_k {num_heads_k}"
        )


def finish_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None,
    out: Tensor | None,
    return_softmax_lse: bool,
    num_splits: int,
    pack_gqa: bool | None,
    more_features: tuple[str, ...] = (),
    max_names: tuple[str, str] = ("max_seqlen_q", "max_seqlen_k"),
) -> ForwardCall:
    """Checks the arguments that every function has and puts the call together."""
    batch, num_heads, head_dim = sequences.batch, q.size(-2), q.size(-1)
    if alibi_slopes is not None:
        check.alibi_slopes_of(alibi_slopes, q.device, batch, num_heads)
    if s_aux is not None:
        check.s_aux_of(s_aux, q.device, num_heads)
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (s_aux is not None and s_aux.requires_grad)
    )
    if out is not None:
        check.out_of(out, q, v.shape[-1], needs_grad)
    scale = head_dim**-0.5 if softmax_scale is None else check.as_float("softmax_scale", softmax_scale)
    left, right = check.window_of(window_size, causal)
    softcap = check.softcap_of(softcap)
    dropout_p = check.dropout_of(dropout_p, softcap)
    num_splits = check.num_splits_of(num_splits)
    check.pack_gqa_of(pack_gqa)
    check.require_bool("deterministic", deterministic)
    check.require_bool("return_attn_probs", return_attn_probs)
    check.require_bool("return_softmax_lse", return_softmax_lse)
    if return_attn_probs and dropout_p > 0:
        sequences = _with_known_max_seqlens(q, k, sequences, max_names)
        more_features += ("attn_probs",)
    # Single tests, since building and reading a table of them takes longer than all other checks.
    features = [*sequences.features(), *more_features]
    if num_heads != k.size(-2):
        features.append("gqa")
    if right == 0:
        features.append("causal")
    if left >= 0 or right > 0:
        features.append("window")
    if softcap > 0:
        features.append("softcap")
    if dropout_p > 0:
        features.append("dropout")
    if num_splits > 1:
        features.append("num_splits")
    if alibi_slopes is not None:
        features.append("alibi")
    if s_aux is not None:
        features.append("sinks")
    if out is not None:
        features.append("out")
    if needs_grad:
        features.append("backward")
    return ForwardCall(
        q, k, v, s_aux, alibi_slopes,
        None,  # rng_state is drawn when the call runs
        *sequences[1:],
        scale, left, right, softcap, dropout_p, num_splits, pack_gqa,
        deterministic or (needs_grad and torch.are_deterministic_algorithms_enabled()),
        frozenset(features), needs_grad, out, return_softmax_lse, return_attn_probs,
    )  # fmt: skip


def _with_known_max_seqlens(q: Tensor, k: Tensor, sequences: Sequences, names: tuple[str, str]) -> Sequences:
    """S_dmask's shape is made of the longest lengths, so here, and only here, they have to be known."""
    max_q, max_k = sequences.max_seqlen_q, sequences.max_seqlen_k
    if sequences.cu_seqlens_q is not None and not max_q:
        max_q = _longest(sequences.cu_seqlens_q, names[0])
    if sequences.cu_seqlens_k is not None and not max_k:
        max_k = _longest(sequences.cu_seqlens_k, names[1])
    if sequences.block_table is not None and not max_k:
        max_k = sequences.block_table.shape[1] * k.shape[1]
    return sequences._replace(max_seqlen_q=max_q, max_seqlen_k=max_k)


def _longest(cu_seqlens: Tensor, name: str) -> int:
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        raise ValueError(
            f"{name} must be an int for return_attn_probs with dropout (it is in the result's shape), "
            f"got None or a tensor"
        )
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
