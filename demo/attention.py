"""Three ways to compute the same causal attention: flash_attn, PyTorch's fused function, the plain formula.

Each takes q (B, S, heads, head_dim), k and v (B, S, kv_heads, head_dim) and a window_size, and returns an
output of q's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from model import UNLIMITED, Window
from torch import Tensor

import flash_attn


@contextmanager
def until_kernels_have(feature: str) -> Iterator[None]:
    """Runs the block on the CPU path, because the CUDA kernels don't have `feature` yet.

    The CPU path is plain PyTorch and takes CUDA tensors too. When kernels get the feature, its `with` goes.
    """
    WAITING_FOR.add(feature)
    with flash_attn.use_path("cpu"):
        yield


WAITING_FOR: set[str] = set()  # what demo.py reports on a machine with a GPU


def _path_for(window_size: Window) -> AbstractContextManager[None]:
    return nullcontext() if window_size == UNLIMITED else until_kernels_have("sliding windows")


def flash(q: Tensor, k: Tensor, v: Tensor, window_size: Window) -> Tensor:
    with _path_for(window_size):
        return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size)


def explain(q: Tensor, k: Tensor, v: Tensor, window_size: Window) -> flash_attn.Explanation:
    """Which path `flash` takes with these arguments, and why."""
    with _path_for(window_size):
        return flash_attn.explain(flash_attn.flash_attn_func, q, k, v, causal=True, window_size=window_size)


def sdpa(q: Tensor, k: Tensor, v: Tensor, window_size: Window) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention; a window needs a mask tensor there."""
    mask = None if window_size == UNLIMITED else _allowed(q.shape[1], window_size, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, window_size: Window) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V with the whole matrix of scores; in float64 it is the demo's reference."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~_allowed(q.shape[1], window_size, q.device), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1).to(v.dtype), v)


def _allowed(seqlen: int, window_size: Window, device: torch.device) -> Tensor:
    """The mask (S, S): True where query i may see key j."""
    distance = torch.arange(seqlen, device=device)[:, None] - torch.arange(seqlen, device=device)
    left = window_size[0]
    return (distance >= 0) if left < 0 else (distance >= 0) & (distance <= left)
