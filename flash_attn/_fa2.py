"""The functions of FlashAttention-2's compiled module, on the checks, paths and ops of the public functions.

`flash_attn_2_cuda` offers them under that module's name, and `flash_attn.flash_attn_interface`, where their arguments
are documented, in the order of its Python functions. Autograd records none of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn import _arguments as check
from flash_attn import _checks
from flash_attn._checks import ForwardCall
from flash_attn._checks_backward import backward_call
from flash_attn._run import draw_rng_state, run, run_backward
from flash_attn.interface_kvcache import flash_attn_with_kvcache

_FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, alibi_slopes: Tensor | None, dropout_p: float,
    softmax_scale: float | None, causal: bool, window_size_left: int | None, window_size_right: int | None,
    softcap: float, return_softmax: bool, gen: torch.Generator | None, /,
) -> _FourTensors:  # fmt: skip
    """A forward pass of dense batches: out, softmax_lse, S_dmask, rng_state."""
    with torch.no_grad():
        options = _options(
            alibi_slopes, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, return_softmax
        )
        return _forward(_checks.dense_call(q, k, v, out=out, num_splits=0, **options), gen)


def varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None, leftpad_k: Tensor | None, block_table: Tensor | None, alibi_slopes: Tensor | None,
    max_seqlen_q: int | Tensor | None, max_seqlen_k: int | Tensor | None, dropout_p: float,
    softmax_scale: float | None, zero_tensors: bool, causal: bool, window_size_left: int | None,
    window_size_right: int | None, softcap: float, return_softmax: bool, gen: torch.Generator | None,
    num_splits: int = 0, /,
) -> _FourTensors:  # fmt: skip
    """A forward pass of packed sequences: out, softmax_lse, S_dmask, rng_state."""
    check.require_bool("zero_tensors", zero_tensors)
    with torch.no_grad():
        options = _options(
            alibi_slopes, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, return_softmax
        )
        call = _checks.varlen_call(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=block_table,
            seqused_k=seqused_k, leftpad_k=leftpad_k, out=out, num_splits=num_splits, **options,
        )  # fmt: skip
        return _forward(call, gen)


def fwd_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, cache_seqlens: Tensor | None,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None, block_table: Tensor | None, alibi_slopes: Tensor | None, out: Tensor | None,
    softmax_scale: float | None, causal: bool, window_size_left: int | None, window_size_right: int | None,
    softcap: float, rotary_interleaved: bool, num_splits: int, /,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`flash_attn.flash_attn_with_kvcache`: out, softmax_lse."""
    with torch.no_grad():
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            block_table, softmax_scale, causal, _window(window_size_left, window_size_right), softcap,
            rotary_interleaved, alibi_slopes, num_splits, return_softmax_lse=True, out=out,
        )  # fmt: skip


def bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, alibi_slopes: Tensor | None, dropout_p: float, softmax_scale: float | None,
    causal: bool, window_size_left: int | None, window_size_right: int | None, softcap: float, deterministic: bool,
    gen: torch.Generator | None, rng_state: Tensor | None, /,
) -> _FourTensors:  # fmt: skip
    """A backward pass of dense batches: dq, dk, dv, softmax_d."""
    with torch.no_grad():
        options = _options(alibi_slopes, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)
        call = _checks.dense_call(q, k, v, out=None, num_splits=0, deterministic=deterministic, **options)
        return _backward(call, gen, rng_state, dout, out, softmax_lse, dq, dk, dv)


def varlen_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, alibi_slopes: Tensor | None,
    max_seqlen_q: int | Tensor | None, max_seqlen_k: int | Tensor | None, dropout_p: float,
    softmax_scale: float | None, zero_tensors: bool, causal: bool, window_size_left: int | None,
    window_size_right: int | None, softcap: float, deterministic: bool, gen: torch.Generator | None,
    rng_state: Tensor | None, /,
) -> _FourTensors:  # fmt: skip
    """A backward pass of packed sequences: dq, dk, dv, softmax_d."""
    check.require_bool("zero_tensors", zero_tensors)
    with torch.no_grad():
        options = _options(alibi_slopes, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap)
        call = _checks.varlen_call(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, out=None, num_splits=0,
            deterministic=deterministic, **options,
        )  # fmt: skip
        return _backward(call, gen, rng_state, dout, out, softmax_lse, dq, dk, dv)


def _options(
    alibi_slopes: Tensor | None, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size_left: int | None, window_size_right: int | None, softcap: float, return_softmax: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all but fwd_kvcache have, as `_checks.finish_call` takes them."""
    check.require_bool("return_softmax", return_softmax)
    return {
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": _window(window_size_left, window_size_right),
        "softcap": softcap,
        "return_attn_probs": return_softmax,
        "return_softmax_lse": True,
        "s_aux": None,
        "pack_gqa": None,
    }


def _window(left: int | None, right: int | None) -> tuple[int | None, int | None]:
    for name, side in (("window_size_left", left), ("window_size_right", right)):
        if side is not None:
            check.as_int(name, side)
    return left, right


def _forward(call: ForwardCall, gen: torch.Generator | None) -> _FourTensors:
    q = call.q
    if gen is not None:
        check.generator_of("gen", gen, q.device)
    if call.dropout_p > 0:
        rng_state = draw_rng_state(q.device, gen)
        call = call._replace(rng_state=rng_state)
    else:
        rng_state = q.new_empty(2, dtype=torch.int64)
    out, lse, *probs = run(call)
    return out, lse, probs[0] if probs else q.new_empty(0), rng_state


def _backward(
    forward: ForwardCall, gen: torch.Generator | None, rng_state: Tensor | None, dout: Tensor, out: Tensor,
    softmax_lse: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
) -> _FourTensors:  # fmt: skip
    device = forward.q.device
    if gen is not None:
        check.generator_of("gen", gen, device)
    if forward.dropout_p > 0:
        if rng_state is not None:
            check.rng_state_of(rng_state, device)
        elif gen is not None:
            rng_state = draw_rng_state(device, gen)
        else:
            raise ValueError("rng_state must be what the forward pass returned when dropout_p > 0, got None")
        forward = forward._replace(rng_state=rng_state)
    deterministic = forward.deterministic or torch.are_deterministic_algorithms_enabled()
    call = backward_call(forward._replace(deterministic=deterministic), dout, out, softmax_lse, dq, dk, dv)
    softmax_d = _softmax_d(dout, out, call.lse)  # first: dq may lie where one of the two does
    return *run_backward(call), softmax_d


def _softmax_d(dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """dout * out summed over head_dim_v, in the shape of LSE; 0 for a row without keys, whatever dout holds there."""
    products = dout.to(lse.dtype, copy=True).mul_(out)  # one temporary tensor, not two
    return products.sum(-1).transpose(-1, -2).masked_fill(lse == -torch.inf, 0.0).contiguous()
