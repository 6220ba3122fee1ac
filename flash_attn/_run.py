"""Runs checked calls: chooses the path, once, and calls the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn import _dispatch, _ops
from flash_attn._checks import ForwardCall
from flash_attn._checks_backward import BackwardCall
from flash_attn._checks_kvcache import KvCacheCall

# out, or a tuple of it and what else was asked for. A union of these would have type checkers object to `out.sum()`
# and to `out, lse = ...` alike; with Any they know a tensor's attributes and let a tuple be taken apart.
Result = Tensor | Any


def run(call: ForwardCall) -> Result:
    """out, or (out, lse), or (out, lse, S_dmask): what the public functions return."""
    path = _dispatch.choose_path(call.q, call.head_dims, call.features)
    if call.dropout_p > 0 and call.rng_state is None:
        call = call._replace(rng_state=draw_rng_state(call.q.device))
    out, lse = _ops.forward(path, call)
    if call.return_attn_probs:
        probs = _ops.attn_probs(path, call, lse) if call.dropout_p > 0 else call.q.new_empty(0)
        return out, lse, probs
    return (out, lse) if call.return_softmax_lse else out


def run_backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; what the caller gave of them is written."""
    forward = call.forward
    path = _dispatch.choose_path(forward.q, forward.head_dims, forward.features | {"backward"})
    return _ops.backward(path, call)


def run_kvcache(call: KvCacheCall) -> Result:
    """Appends, rotates q, attends: one path for all of it."""
    forward = call.forward
    path = _dispatch.choose_path(forward.q, forward.head_dims, forward.features)
    if call.append is not None:
        used_next = forward.q, forward.s_aux, forward.alibi_slopes, forward.out
        forward = forward.with_seqused_k(_ops.append_kv(path, call.append, *used_next))
    if call.rotate_q:
        forward = forward._replace(q=_ops.rotary(path, call.rotary_arguments()))
    out, lse = _ops.forward(path, forward)
    return (out, lse) if forward.return_softmax_lse else out


def run_combine(out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    path = _dispatch.choose_path(out_partial, (out_partial.shape[-1],) * 2, frozenset({"combine"}))
    return _ops.combine(path, out_partial, lse_partial, out_dtype)


def draw_rng_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh dropout [seed, offset], by default from the device's default generator, so that torch's own means of
    repeating random numbers (manual_seed, checkpointing, CUDA graphs) apply."""
    return torch.randint(2**62, (2,), generator=generator, dtype=torch.int64, device=device)
