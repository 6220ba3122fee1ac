"""The splits that kernels derive from the lengths, computed ahead: csrc/kernels/sm80/few_rows_schedule.h in torch."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _dispatch
from flash_attn._arguments import MAX_SPLITS
from flash_attn._checks_kvcache import kvcache_call
from flash_attn._plain import is_plain

_MAX_TRIES = 3
_UNKNOWN_LENGTH = 1 << 20

_LIB = torch.library.Library("flash_attn", "FRAGMENT")
_SCHEMA = (
    "(Tensor seqlens_k, Tensor? cu_seqlens_q, Tensor? leftpad, SymInt num_heads, SymInt num_heads_k, SymInt head_dim, "
    "SymInt head_dim_v, ScalarType dtype, SymInt longest_q, SymInt longest_k, SymInt? page_size, SymInt window_left, "
    "SymInt window_right, bool has_softcap, SymInt num_splits, bool? pack_gqa) -> Tensor"
)


class Step(NamedTuple):
    """What get_scheduler_metadata is told of a decoding step, as the op takes it. A longest length of 0 is unknown."""

    seqlens_k: Tensor  # new tokens and left padding included
    cu_seqlens_q: Tensor | None
    leftpad: Tensor | None
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    longest_q: int
    longest_k: int
    page_size: int | None
    window_left: int
    window_right: int
    has_softcap: bool
    num_splits: int
    pack_gqa: bool | None


def scheduler_metadata(step: Step) -> Tensor:
    """What get_scheduler_metadata returns; nothing waits for the device."""
    # The planner, which takes tensors and returns text, is not for tracing: it is within the op.
    return _metadata(*step) if is_plain(step.seqlens_k) else torch.ops.flash_attn.scheduler_metadata(*step)


def _metadata(*arguments: Any) -> Tensor:
    step = Step(*arguments)
    metadata = step.seqlens_k.new_zeros(_size(step.seqlens_k))
    metadata[1 : 1 + step.seqlens_k.shape[0]] = num_splits(step)
    return metadata


def _fake_metadata(seqlens_k: Tensor, *_: Any) -> Tensor:
    return seqlens_k.new_empty(_size(seqlens_k))


def _size(seqlens_k: Tensor) -> int:
    return 1 + 4 * ((seqlens_k.shape[0] + 3) // 4 * 4)


_LIB.define("scheduler_metadata" + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIB.impl("scheduler_metadata", _metadata, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn::scheduler_metadata", _fake_metadata, lib=_LIB)


def num_splits(step: Step) -> int | Tensor:
    """Of each entry."""
    plan = _plan(step)
    if plan is None:
        return max(step.num_splits, 1)
    return plan["num_splits"] or _by_lengths(step, plan)


def _plan(step: Step) -> dict[str, Any] | None:
    """The kernel's plan for tensors of these shapes, of which there is a row or a page; None if no kernel would run."""
    call = _call(step)
    try:
        path = _dispatch.path_of_explained(call.q, call.head_dims, call.features)
    except NotImplementedError:
        return None
    arch = _dispatch.PATHS[path].arch
    if arch is None:
        return None
    return json.loads(torch.ops.flash_attn.explain_forward(*call.op_arguments(), arch))


def _call(step: Step) -> Any:
    lengths = step.seqlens_k
    batch, longest_k = lengths.shape[0], step.longest_k or _UNKNOWN_LENGTH
    one = lengths.new_empty(1, dtype=step.dtype)
    rows_q = (batch, max(step.longest_q, 1)) if step.cu_seqlens_q is None else (batch * max(step.longest_q, 1),)
    rows_k = (batch, longest_k) if step.page_size is None else (1, step.page_size)
    # A page's rows lie apart, or SM90's kernels would not take them.
    rows = 1 if step.page_size is None else step.page_size
    table = None
    if step.page_size is not None:
        num_pages = -(-longest_k // step.page_size)
        table = lengths.new_empty(num_pages).expand(batch, num_pages)
    return kvcache_call(
        one.expand(*rows_q, step.num_heads, step.head_dim),
        one.new_empty(rows, 1, step.head_dim).expand(*rows_k, step.num_heads_k, step.head_dim),
        one.new_empty(rows, 1, step.head_dim_v).expand(*rows_k, step.num_heads_k, step.head_dim_v),
        None, None, rotary_cos=None, rotary_sin=None, cache_seqlens=lengths, cache_batch_idx=None,
        cache_leftpad=step.leftpad, block_table=table, rotary_interleaved=True, cu_seqlens_q=step.cu_seqlens_q,
        max_seqlen_q=step.longest_q or None, cu_seqlens_k_new=None, scheduler_metadata=None, softmax_scale=None,
        causal=False, window_size=(step.window_left, step.window_right), softcap=float(step.has_softcap),
        alibi_slopes=None, num_splits=step.num_splits, return_softmax_lse=False, s_aux=None, out=None,
        pack_gqa=step.pack_gqa,
    ).forward  # fmt: skip


def _by_lengths(step: Step, plan: dict[str, Any]) -> Tensor:
    tile_m, tile_n = plan["tile_m"], plan["tile_n"]
    keys = step.seqlens_k.to(torch.int64)
    if step.leftpad is not None:
        keys = keys - step.leftpad
    longest_q = torch.full_like(keys, max(step.longest_q, 1))
    queries = longest_q if step.cu_seqlens_q is None else step.cu_seqlens_q.diff().to(torch.int64)
    first = torch.zeros_like(keys) if step.window_left < 0 else (keys - queries - step.window_left).clamp(min=0)
    key_tiles = ((keys + tile_n - 1) // tile_n - first // tile_n).clamp(min=0) * (queries > 0)
    row_tiles = (queries * plan["packed_heads"] + tile_m - 1) // tile_m
    target = plan["target_slots"]

    def splits(length: Tensor) -> Tensor:
        return ((key_tiles + length - 1) // length).clamp(1, MAX_SPLITS)

    mean = (((row_tiles * key_tiles).sum() + target - 1) // target).clamp(min=plan["min_tiles"])
    found, length = mean, mean
    fits = torch.zeros_like(mean, dtype=torch.bool)
    for _ in range(_MAX_TRIES + 1):
        slots = (row_tiles * splits(length)).sum()
        found = torch.where(fits | (slots > target), found, length)
        fits = fits | (slots <= target)
        length = (length * slots + target - 1) // target
    return splits(found).to(torch.int32)
