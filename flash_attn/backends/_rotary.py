"""Rotary position embedding (Su et al., 'RoFormer', 2021), out of place."""

from __future__ import annotations

import torch
from torch import Tensor

from ._sequences import starts_of


def token_positions(
    name: str, x: Tensor, offsets: Tensor, cu_seqlens: Tensor | None, cu_seqlens_name: str, advance: bool
) -> Tensor:
    """Position of every token of x: (B, S), or (T,) up to the end of a packed x's last entry."""
    offsets = offsets.to(torch.int64)
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device) if advance else offsets.new_zeros(1)
        return (offsets[:, None] + steps).expand(x.shape[:2])
    starts = starts_of(cu_seqlens_name, name, cu_seqlens, x.shape[0])
    # Of no entry torch would make a tensor of floats.
    first = torch.tensor(starts[:-1], dtype=torch.int64, device=x.device)
    lengths = torch.tensor(starts[1:], dtype=torch.int64, device=x.device) - first
    positions = offsets.repeat_interleave(lengths)
    if advance:
        first = first.repeat_interleave(lengths)
        positions = positions + torch.arange(starts[-1], device=x.device) - first
    return positions


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D) rotated at `positions` (...); computed in float32 or above, stored in x's dtype."""
    if positions.numel():
        low, high = positions.min().item(), positions.max().item()
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"rotary_cos and rotary_sin must hold the positions {low} to {high}, got {cos.shape[0]} rows"
            )
    out = x.clone(memory_format=torch.contiguous_format)
    rotate_(out, cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2), interleaved)
    return out


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotates x (..., H, D) in place, by each token's own cos and sin (..., 1, rotary_dim / 2). Computed in float32 or
    above.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    half = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].to(dtype), x[..., second].to(dtype)
    # Both before either is written: a and b may be views of x.
    rotated_a, rotated_b = a * cos - b * sin, a * sin + b * cos
    x[..., first] = rotated_a
    x[..., second] = rotated_b


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    advance: bool,
) -> Tensor:
    """Rotate token i of entry b at position offsets[b] + i, or offsets[b] if not `advance`."""
    # An idle entry's tokens, at -1, see no key: their values don't matter.
    positions = token_positions("q", x, offsets.clamp(min=0), cu_seqlens, "cu_seqlens_q", advance)
    if cu_seqlens is None:
        return rotate(x, cos, sin, positions, interleaved)
    out = x.clone(memory_format=torch.contiguous_format)
    num_tokens = positions.numel()
    out[:num_tokens] = rotate(x[:num_tokens], cos, sin, positions, interleaved)
    return out
