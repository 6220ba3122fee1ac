"""Three ways to compute the same causal attention: flash_attn, PyTorch's fused function, the plain formula.

Each takes q (B, S, heads, head_dim), k and v (B, S, kv_heads, head_dim) and a window_size, and returns an
output of q's shape.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from model import UNLIMITED, Config, Window, rotary_tables
from torch import Tensor

import flash_attn

# Jobs of this machine's kernels that have to run on the CPU path; choose_paths fills it.
ON_THE_CPU_PATH: set[str] = set()


def choose_paths(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, flash_attn.Explanation]:
    """Which path each job takes here, and why: the kernels if they have all that a layer's call needs.

    The CPU path is plain PyTorch and takes CUDA tensors too.
    """
    ON_THE_CPU_PATH.clear()
    chosen = {job: explained(config, device, dtype) for job, explained in _EXPLAINED.items()}
    if device.type == "cuda":
        ON_THE_CPU_PATH.update(job for job, explanation in chosen.items() if explanation.path is None)
    return chosen


def path_for(job: str) -> AbstractContextManager[None]:
    """Entered around the calls of a job: "training", "evaluation" or "generation"."""
    return flash_attn.use_path("cpu") if job in ON_THE_CPU_PATH else nullcontext()


def _layer(config: Config, device: torch.device, dtype: torch.dtype, needs_grad: bool) -> flash_attn.Explanation:
    q = torch.zeros(1, 1, config.heads, config.head_dim, device=device, dtype=dtype)
    kv = q[:, :, : config.kv_heads]
    return explain(q.requires_grad_(needs_grad), kv, kv, config.window_size(0))


def _step(config: Config, device: torch.device, dtype: torch.dtype) -> flash_attn.Explanation:
    """A step from a paged cache that rotates, appends and attends."""
    q = torch.zeros(1, 1, config.heads, config.head_dim, device=device, dtype=dtype)
    pages = torch.zeros(1, 16, config.kv_heads, config.head_dim, device=device, dtype=dtype)
    cos, sin = rotary_tables(16, config.head_dim, device, dtype)
    zero = torch.zeros(1, 1, device=device, dtype=torch.int32)
    return flash_attn.explain(
        flash_attn.flash_attn_with_kvcache, q, pages, pages, pages[:, :1], pages[:, :1], rotary_cos=cos, rotary_sin=sin,
        rotary_interleaved=False, cache_seqlens=zero[0], block_table=zero, causal=True,
        window_size=config.window_size(0),
    )  # fmt: skip


_EXPLAINED = {
    "training": partial(_layer, needs_grad=True),
    "evaluation": partial(_layer, needs_grad=False),
    "generation": _step,
}


def flash(q: Tensor, k: Tensor, v: Tensor, window_size: Window) -> Tensor:
    return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size)


def explain(q: Tensor, k: Tensor, v: Tensor, window_size: Window) -> flash_attn.Explanation:
    """Which path `flash` takes with these arguments, and why."""
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
