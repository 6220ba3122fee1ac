"""The rotation behind `flash_attn.layers.rotary`: of a tensor or some parts of it, its gradient, its checks, and each
token's row of the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _arguments as check
from flash_attn._plain import is_plain
from flash_attn.backends._rotary import rotate_

# Indices along the third dimension; None for the tensor itself.
Places = tuple[int | slice, ...] | None


def parts_of(x: Tensor, places: Places) -> tuple[Tensor, ...]:
    return (x,) if places is None else tuple(x[:, :, place] for place in places)


def rotated(x: Tensor, places: Places, interleaved: bool, inplace: bool, tables: Sequence[Tensor]) -> Tensor:
    """`tables`: cos and sin of the tokens of each part, or one pair for all parts.

    Not the same pair for each: torch.compile of 2.15 refuses a tensor that is given twice.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotation.apply(x, places, interleaved, inplace, *tables)
    return _rotate_parts(x, places, interleaved, inplace, tables)


def _rotate_parts(x: Tensor, places: Places, interleaved: bool, inplace: bool, tables: Sequence[Tensor]) -> Tensor:
    out = x if inplace else x.clone()
    parts = parts_of(out, places)
    pairs = list(zip(tables[::2], tables[1::2], strict=True))
    for part, (cos, sin) in zip(parts, pairs * len(parts) if len(pairs) == 1 else pairs, strict=True):
        rotate_(part, cos, sin, interleaved)
    return out


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation the other way. Tables get none."""

    @staticmethod
    def forward(x: Tensor, places: Places, interleaved: bool, inplace: bool, *tables: Tensor) -> Tensor:
        return _rotate_parts(x, places, interleaved, inplace, tables)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.places, ctx.interleaved, _, *tables = inputs
        ctx.save_for_backward(*tables)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tables = [-table if index % 2 else table for index, table in enumerate(ctx.saved_tensors)]
        return (rotated(dout, ctx.places, ctx.interleaved, False, tables), *[None] * (3 + len(tables)))


# ---- Checks, and each token's row of the tables ------------------------------------------------------------------


class Names(NamedTuple):
    """What a function calls the tensor that it rotates, or has the part of, and the tables."""

    x: str = "x"
    cos: str = "cos"
    sin: str = "sin"


NAMES = Names()


def check_written(name: str, x: Tensor) -> None:
    check.require_no_overlap(name, x.stride(), x.shape)


def _check(
    x: Any, cos: Any, sin: Any, seqlen_offsets: Any, cu_seqlens: Any, max_seqlen: Any, names: Names
) -> int | Tensor:
    """Returns seqlen_offsets."""
    check.require_tensor(names.x, x)
    check.require_strided(names.x, x)
    check.require_float_dtype(names.x, x)
    packed = cu_seqlens is not None
    check.require_rank(names.x, x, "(total, num_heads, head_dim)" if packed else "(batch, seqlen, num_heads, head_dim)")
    whose = f"{names.x}'s"
    for name, table in ((names.cos, cos), (names.sin, sin)):
        check.require_tensor(name, table)
        check.require_strided(name, table)
        check.require_device(name, table, x.device, whose)
        check.require_float_dtype(name, table)
        check.require_rank(name, table, "(seqlen_rotary, rotary_dim / 2)")
        if table.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} must not require grad (it has no gradient), got requires_grad=True")
    check.require_shape(names.sin, sin, tuple(cos.shape), f"{names.cos}'s")
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"{names.cos} must have at most head_dim / 2 columns of {x.shape[-1]} / 2, got {cos.shape[1]}")
    batch = (
        check.int32_vector("cu_seqlens", cu_seqlens, x.device, None, "(batch + 1,)", whose) - 1
        if packed
        else x.shape[0]
    )
    if batch < 0:
        raise ValueError("cu_seqlens must have at least one element, got none")
    longest = None if packed else x.shape[1]
    if max_seqlen is not None:
        longest = check.as_int("max_seqlen", max_seqlen)
        if not packed:
            raise ValueError(f"max_seqlen must not be given without cu_seqlens, got {max_seqlen}")
        if longest < 0:
            raise ValueError(f"max_seqlen must be at least 0, got {max_seqlen}")
    if not isinstance(seqlen_offsets, Tensor):
        offset = check.size_of("seqlen_offsets", seqlen_offsets, 0)
        if longest is not None and offset + longest > cos.shape[0]:
            raise ValueError(
                f"{names.cos} and {names.sin} must have rows for the positions below {offset + longest}, "
                f"got {cos.shape[0]} rows"
            )
        return offset
    check.require_device("seqlen_offsets", seqlen_offsets, x.device, whose)
    if seqlen_offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seqlen_offsets must have dtype int32 or int64, got {seqlen_offsets.dtype}")
    check.require_shape("seqlen_offsets", seqlen_offsets, (batch,), "(batch,)")
    return seqlen_offsets


def checked_tables(
    x: Any,
    cos: Any,
    sin: Any,
    seqlen_offsets: Any,
    cu_seqlens: Any = None,
    max_seqlen: Any = None,
    names: Names = NAMES,
) -> tuple[Tensor, Tensor]:
    offsets = _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, names)
    return _tables_of_tokens(x, cos, sin, offsets, cu_seqlens, names)


def _tables_of_tokens(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None, names: Names
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token, (..., 1, rotary_dim / 2): 1 and 0 where a token stays as it is."""
    if cu_seqlens is None and not isinstance(seqlen_offsets, Tensor):
        rows = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return cos[rows, None], sin[rows, None]
    positions, is_used = _positions(x, seqlen_offsets, cu_seqlens)
    num_rows = cos.shape[0]
    has_row = (positions >= 0) & (positions < num_rows)
    if x.device.type == "cpu" and is_plain(x):
        outside = positions[is_used & ~has_row]
        if outside.numel():
            raise ValueError(
                f"{names.cos} and {names.sin} must have a row for each position, got {outside[0].item()} of {num_rows}"
            )
    rotates = (is_used & has_row)[..., None, None]
    # A table without rows is one that no token has a row of.
    rows = positions.clamp(0, max(num_rows - 1, 0))
    if num_rows == 0:
        cos, sin = cos.new_ones((1, cos.shape[1])), sin.new_zeros((1, sin.shape[1]))
    return torch.where(rotates, cos[rows].unsqueeze(-2), 1), torch.where(rotates, sin[rows].unsqueeze(-2), 0)


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The position of each token, (batch, seqlen) or (total,), and whether it belongs to a sequence. Reads nothing."""
    if cu_seqlens is None:
        assert isinstance(seqlen_offsets, Tensor)
        positions = seqlen_offsets.to(torch.int64)[:, None] + torch.arange(x.shape[1], device=x.device)
        return positions, torch.ones_like(positions, dtype=torch.bool)
    tokens = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    num_entries = cu_seqlens.shape[0] - 1
    if num_entries == 0:
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)
    entries = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    is_used = (entries < num_entries) & (tokens >= cu_seqlens[0])
    entries = entries.clamp(max=num_entries - 1)
    offsets = seqlen_offsets.to(torch.int64)[entries] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    return tokens - cu_seqlens[entries] + offsets, is_used
