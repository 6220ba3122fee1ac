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
_STRIDED = torch.strided
_RANKS = {layout: layout.count(",") + 1 for layout in _LAYOUTS}


class VarlenNames(NamedTuple):
    """What a function with variable lengths calls its arguments."""

    qkv: tuple[str, str, str] = ("q", "k", "v")
    cu_seqlens: tuple[str, str] = ("cu_seqlens_q", "cu_seqlens_k")
    max_seqlens: tuple[str, str] = ("max_seqlen_q", "max_seqlen_k")
    whose: str = "q's"


VARLEN_NAMES = VarlenNames()


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
    head_dims: tuple[int, int]  # of q and k, and of v
    features: frozenset[str]
    needs_grad: bool
    out: Tensor | None
    return_softmax_lse: bool
    return_attn_probs: bool

    def op_arguments(self) -> tuple[Any, ...]:
        return self[:NUM_OP_ARGUMENTS]

    def with_seqused_k(self, seqused_k: Tensor) -> ForwardCall:
        """As _replace, in half its time: every step that appends does this."""
        return ForwardCall._make((*self[:_SEQUSED_K], seqused_k, *self[_SEQUSED_K + 1 :]))


_SEQUSED_K = ForwardCall._fields.index("seqused_k")
NUM_OP_ARGUMENTS = ForwardCall._fields.index("head_dims")


class Sequences(NamedTuple):
    """Where the sequences lie in q, k and v, already checked: fields of ForwardCall, in its order."""

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


DENSE = Sequences()

# Of q, k and v: asking a tensor for its sizes takes longer than most checks of them.
Shapes = tuple[torch.Size, torch.Size, torch.Size]


def dense_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    names: tuple[str, str, str] = ("q", "k", "v"),
    **options: Any,
) -> ForwardCall:
    """The call of flash_attn_func; `options` are its other arguments, all of them."""
    return finish_call(q, k, v, dense_shapes(q, k, v, names), DENSE, **options)


def dense_shapes(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")) -> Shapes:
    shapes = check_qkv(q, k, v, names, DENSE_Q, DENSE_KV)
    if shapes[0][0] != shapes[1][0]:
        raise ValueError(f"{names[1]} must have q's batch size {shapes[0][0]}, got shape {tuple(shapes[1])}")
    return shapes


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
    names: VarlenNames = VARLEN_NAMES,
    **options: Any,
) -> ForwardCall:
    """The call of flash_attn_varlen_func; `options` are the arguments that flash_attn_func has too."""
    shapes, sequences = varlen_sequences(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_q, seqused_k, leftpad_k,
        scheduler_metadata, names,
    )  # fmt: skip
    return finish_call(q, k, v, shapes, sequences, max_names=names.max_seqlens, **options)


def varlen_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    block_table: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    scheduler_metadata: Tensor | None,
    names: VarlenNames = VARLEN_NAMES,
) -> tuple[Shapes, Sequences]:
    shapes = check_qkv(q, k, v, names.qkv, VARLEN_Q, VARLEN_KV if block_table is None else PAGED_KV)
    device = q.device
    batch = check.int32_vector(names.cu_seqlens[0], cu_seqlens_q, device, None, "(batch + 1,)", names.whose) - 1
    if batch < 0:
        raise ValueError(f"{names.cu_seqlens[0]} must have batch + 1 elements, at least one, got none")
    if seqused_q is not None:
        check.int32_vector("seqused_q", seqused_q, device, batch, "(batch,)")
    if seqused_k is not None:
        check.int32_vector("seqused_k", seqused_k, device, batch, "(batch,)")
    if leftpad_k is not None:
        check.int32_vector("leftpad_k", leftpad_k, device, batch, "(batch,)")
    if scheduler_metadata is not None:
        check.scheduler_metadata_of(scheduler_metadata, device, batch)
    if cu_seqlens_k is not None:
        if cu_seqlens_k is not cu_seqlens_q:
            check.int32_vector(names.cu_seqlens[1], cu_seqlens_k, device, batch + 1, "(batch + 1,)")
    elif block_table is None:
        raise ValueError(f"{names.cu_seqlens[1]} must be given when block_table is not, got None")
    elif seqused_k is None:
        raise ValueError(f"{names.cu_seqlens[1]} must be given when seqused_k is not, got None for both")
    if block_table is not None:
        check.block_table_of(block_table, device, batch)
        check.require_page_size(names.qkv[1], shapes[1])
        # Pages have no slots in a packed tensor: below this line their lengths are seqused_k, and nothing
        # else.
        if seqused_k is None:
            seqused_k = cu_seqlens_k.diff()
        cu_seqlens_k = None
    longest_q = check.max_seqlen_of(names.max_seqlens[0], max_seqlen_q)
    longest_k = check.max_seqlen_of(names.max_seqlens[1], max_seqlen_k)
    return shapes, Sequences(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, block_table, None, scheduler_metadata,
        longest_q, longest_k,
    )  # fmt: skip


def check_qkv(q: Any, k: Any, v: Any, names: tuple[str, str, str], layout_q: str, layout_kv: str) -> Shapes:
    """What q, k and v have to agree on in every layout."""
    name_q, name_k, name_v = names
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        check.require_tensor(name_q, q)
        check.require_tensor(name_k, k)
        check.require_tensor(name_v, v)
    if (
        (q.layout is not _STRIDED or k.layout is not _STRIDED or v.layout is not _STRIDED)
        or (q.is_nested or k.is_nested or v.is_nested)  # of any layout; they have no shape
    ):
        check.require_strided(name_q, q)
        check.require_strided(name_k, k)
        check.require_strided(name_v, v)
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
    if not 1 <= head_dim_v <= check.MAX_HEAD_DIM_V:
        raise ValueError(f"{name_v} must have a head_dim_v from 1 to {check.MAX_HEAD_DIM_V}, got {head_dim_v}")
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
    return shape_q, shape_k, shape_v


def finish_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shapes: Shapes,
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
    max_names: tuple[str, str] = VARLEN_NAMES.max_seqlens,
) -> ForwardCall:
    """Checks the arguments that every function has and puts the call together."""
    shape_q, shape_k, shape_v = shapes
    num_heads, head_dim, head_dim_v = shape_q[-2], shape_q[-1], shape_v[-1]
    if alibi_slopes is not None:
        batch = check.batch_size_of(q, sequences.cu_seqlens_q)
        check.alibi_slopes_of(alibi_slopes, q.device, batch, num_heads)
    if s_aux is not None:
        check.s_aux_of(s_aux, q.device, num_heads)
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (s_aux is not None and s_aux.requires_grad)
    )
    if out is not None:
        check.out_of(out, q, shape_q, head_dim_v, needs_grad)
    scale = head_dim**-0.5 if softmax_scale is None else check.as_float("softmax_scale", softmax_scale)
    left, right = check.window_of(window_size, causal)
    softcap, dropout_p, num_splits = check.options_of(
        softcap, dropout_p, num_splits, pack_gqa, deterministic, return_attn_probs, return_softmax_lse
    )
    if return_attn_probs and dropout_p > 0:
        sequences = _with_known_max_seqlens(q, k, sequences, max_names)
    # A name for each feature that the call uses.
    names = (
        "dense" if sequences.cu_seqlens_q is None else "varlen",
        None if sequences.seqused_q is None else "seqused_q",
        None if sequences.seqused_k is None else "seqused_k",
        None if sequences.leftpad_k is None else "leftpad",
        None if sequences.block_table is None else "paged",
        None if sequences.cache_batch_idx is None else "cache_batch_idx",
        *more_features,
        "wide_heads" if head_dim > check.MAX_HEAD_DIM_V else None,
        "gqa" if num_heads != shape_k[-2] else None,
        "causal" if right == 0 else None,
        "window" if left >= 0 or right > 0 else None,
        "softcap" if softcap > 0 else None,
        "dropout" if dropout_p > 0 else None,
        "attn_probs" if return_attn_probs and dropout_p > 0 else None,
        "num_splits" if num_splits > 1 else None,
        None if alibi_slopes is None else "alibi",
        None if s_aux is None else "sinks",
        None if out is None else "out",
        "backward" if needs_grad else None,
    )
    return ForwardCall._make((
        q, k, v, s_aux, alibi_slopes,
        None,  # rng_state is drawn when the call runs
        *sequences,
        scale, left, right, softcap, dropout_p, num_splits, pack_gqa,
        deterministic or (needs_grad and torch.are_deterministic_algorithms_enabled()),
        (head_dim, head_dim_v), _feature_set(names), needs_grad, out, return_softmax_lse, return_attn_probs,
    ))  # fmt: skip


# A set takes longer to make than to look up, and to hash where the path is chosen.
_feature_sets: dict[tuple[str | None, ...], frozenset[str]] = {}


def _feature_set(names: tuple[str | None, ...]) -> frozenset[str]:
    if torch.compiler.is_compiling():  # which would watch the table and compile again when it grows
        return frozenset([name for name in names if name is not None])
    found = _feature_sets.get(names)
    if found is None:
        found = _feature_sets[names] = frozenset(name for name in names if name is not None)
    return found


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
