"""Turns the arguments of a backward pass that a caller runs alone into a checked `BackwardCall`, as `_checks` does."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _arguments as check
from flash_attn._checks import ForwardCall


class BackwardCall(NamedTuple):
    """What the backward ops take. Each of dq, dk and dv is where that gradient goes, or None."""

    forward: ForwardCall
    dout: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None


def backward_call(
    forward: ForwardCall, dout: Any, out: Any, softmax_lse: Any, dq: Any, dk: Any, dv: Any
) -> BackwardCall:
    """The call of a backward pass; `forward` is that of its forward pass, with dropout's rng_state."""
    q = forward.q
    shape_out = (*q.shape[:-1], forward.head_dims[1])
    for name, tensor in (("dout", dout), ("out", out)):
        _require_like_q(name, tensor, q, shape_out, "q's with head_dim_v")
    lse = _lse_of(softmax_lse, q)
    grads = (("dq", dq), ("dk", dk), ("dv", dv))
    for (name, grad), tensor in zip(grads, (q, forward.k, forward.v), strict=True):
        if grad is not None:
            _require_like_q(name, grad, q, tuple(tensor.shape), f"{name[1:]}'s")
            check.require_writable_rows(name, grad, grad.shape)
    for (name, grad), (other_name, other) in combinations(grads, 2):
        if grad is not None and grad is other:
            raise ValueError(f"{other_name} must not be the tensor given as {name}: both are written")
    return BackwardCall(forward, dout, out, lse, dq, dk, dv)


def _require_like_q(name: str, tensor: Any, q: Tensor, shape: tuple[int, ...], layout: str) -> None:
    check.require_tensor(name, tensor)
    check.require_strided(name, tensor)
    check.require_device(name, tensor, q.device)
    check.require_dtype(name, tensor, q.dtype, "q's ")
    check.require_shape(name, tensor, shape, layout)


def _lse_of(lse: Any, q: Tensor) -> Tensor:
    """Checks LSE and returns it with queries last.

    diffusers passes a transposed view of what the forward pass gave it: FlashAttention-2 reads LSE's memory, whatever
    its shape is. Where both numbers are the same, the strides tell.
    """
    check.require_tensor("softmax_lse", lse)
    check.require_strided("softmax_lse", lse)
    check.require_device("softmax_lse", lse, q.device)
    check.require_dtype("softmax_lse", lse, torch.float64 if q.dtype == torch.float64 else torch.float32)
    *batch, num_rows, num_heads = q.shape[:-1]
    is_transposed = num_rows != num_heads or (lse.stride(-1) != 1 and lse.stride(-2) == 1)
    if tuple(lse.shape) == (*batch, num_rows, num_heads) and is_transposed:
        lse = lse.transpose(-1, -2)
    layout = "(batch, num_heads, seqlen_q)" if batch else "(num_heads, total_q)"
    check.require_shape("softmax_lse", lse, (*batch, num_heads, num_rows), layout)
    return lse
