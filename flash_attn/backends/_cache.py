"""Append new keys and values to a dense or paged cache, and combine split results."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rotary import rotate, token_positions
from ._sequences import cache_rows


def _check_lengths(before: Tensor, num_new: int | Tensor, capacity: int) -> None:
    """An idle entry may have -1 tokens before its only new one."""
    after = before.to(torch.int64) + num_new
    refused = before[(before < 0) & (after != 0)]
    if refused.numel():
        raise ValueError(f"cache_seqlens must not be negative, got {refused.min().item()}")
    if after.numel() and after.max() > capacity:
        raise ValueError(
            f"cache_seqlens plus the new tokens must fit the cache's {capacity} tokens, got {after.max().item()}"
        )


def _check_rows(cache_batch_idx: Tensor, written: Tensor) -> None:
    rows = cache_batch_idx[written.unique()]
    values, counts = rows.unique(return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"cache_batch_idx must not name a row twice with k, got {values[counts > 1][0].item()} twice")


def _check_pages(ids: Tensor, num_pages: int) -> None:
    if not ids.numel():
        return
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= num_pages:
        raise ValueError(
            f"block_table must hold ids of at least 0 and below {num_pages} for pages in use, "
            f"got {low if low < 0 else high}"
        )


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor,
    cu_seqlens_k_new: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    rotary_interleaved: bool,
) -> Tensor:
    """Write token t of entry b at cache position cache_seqlens[b] + t, with k rotated at that position.

    Tokens at negative positions, those of idle entries, are left out. Returns cache_seqlens plus the new tokens.
    """
    k, v = k.detach(), v.detach()
    positions = token_positions("k", k, cache_seqlens, cu_seqlens_k_new, "cu_seqlens_k_new", True)
    entries = torch.arange(cache_seqlens.shape[0], device=k.device)
    if cu_seqlens_k_new is None:
        num_new = k.shape[1]
        entries = entries[:, None].expand_as(positions)
    else:
        num_new = cu_seqlens_k_new.diff()
        entries = entries.repeat_interleave(num_new.to(torch.int64))
        num_tokens = positions.numel()
        k, v = k[:num_tokens], v[:num_tokens]
    page_size = k_cache.shape[1]
    capacity = page_size if block_table is None else block_table.shape[1] * page_size
    _check_lengths(cache_seqlens, num_new, capacity)
    kept = positions >= 0
    if not kept.all():
        k, v, entries, positions = k[kept], v[kept], entries[kept], positions[kept]
    if rotary_cos is not None and rotary_sin is not None:
        k = rotate(k, rotary_cos, rotary_sin, positions, rotary_interleaved)
    rows = entries
    if cache_batch_idx is not None:
        whose, table = ("the cache's", k_cache) if block_table is None else ("block_table's", block_table)
        cache_rows(cache_batch_idx, whose, table.shape[0])
        _check_rows(cache_batch_idx, entries)
        rows = cache_batch_idx.to(torch.int64)[entries]
    if block_table is not None:
        rows = block_table[rows, positions // page_size].to(torch.int64)
        positions = positions % page_size
        _check_pages(rows, k_cache.shape[0])
    k_cache[rows, positions] = k
    v_cache[rows, positions] = v
    return cache_seqlens + num_new


def combine(out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Merge results over disjoint keys, split along dimension 0: out (…, H, D) and lse (…, H)."""
    dtype = torch.promote_types(out_partial.dtype, torch.float32)
    lse = torch.logsumexp(lse_partial, dim=0)
    out = torch.zeros(out_partial.shape[1:], dtype=dtype, device=out_partial.device)
    for split_out, split_lse in zip(out_partial, lse_partial, strict=True):
        empty = split_lse == -torch.inf
        weight = torch.where(empty, 0, torch.exp(split_lse - lse)).to(dtype).unsqueeze(-1)
        # A split without keys may hold anything, NaN included.
        out += torch.where(empty.unsqueeze(-1), 0, split_out.to(dtype)) * weight
    return out.to(out_partial.dtype if out_dtype is None else out_dtype), lse
