"""The public functions: signatures and documentation. Checks, ops and paths are in the modules named _*."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from flash_attn import _checks, _checks_packed
from flash_attn._checks import ForwardCall, Window
from flash_attn._checks_kvcache import kvcache_call
from flash_attn._run import Result, run
from flash_attn.interface_kvcache import flash_attn_combine, flash_attn_with_kvcache, get_scheduler_metadata
from flash_attn.interface_varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
) -> Result:
    """Exact attention, softmax(q k^T * softmax_scale) v, in memory linear in the sequence length.

    The last query is aligned with the last key. For query i and key j, both counted from 0, let
    d = i + seqlen_k - seqlen_q - j. Their score is made in this order: s = softmax_scale * q_i . k_j, then
    softcap * tanh(s / softcap) if softcap > 0, then s - slope * abs(d) with ALiBi, then -inf where masked.

    Parameters
    ----------
    q : Tensor, (batch, seqlen_q, num_heads, head_dim)
        float16, bfloat16, float32 or float64, of any strides; head_dim from 1 to 576.
    k : Tensor, (batch, seqlen_k, num_heads_k, head_dim)
        num_heads must be a multiple of num_heads_k; query head h attends to key head h // (num_heads //
        num_heads_k).
    v : Tensor, (batch, seqlen_k, num_heads_k, head_dim_v)
        head_dim_v from 1 to 512; it need not be head_dim.
    dropout_p : float
        Probability, in [0, 1), with which a softmax probability is dropped; the kept ones are divided by
        1 - dropout_p. Pass 0.0 for evaluation. The random numbers are Philox-4x32-10, seeded from the default
        generator of q's device. Not together with softcap.
    softmax_scale : float, optional
        Factor of the scores; head_dim ** -0.5 if None.
    causal : bool
        Allow only d >= 0. It replaces the right side of window_size by 0.
    window_size : pair of int or None
        (left, right): allow only -right <= d <= left, both bounds included. A side that is negative, None or
        at least 2**31 - 1 is infinite. Outside torch.compile an integer tensor of two elements on the CPU is
        accepted too.
    softcap : float
        Bound of the scores, as in Gemma 2; 0.0 switches it off. Like softmax_scale a number within float32's range.
    alibi_slopes : Tensor, (num_heads,) or (batch, num_heads), float32, optional
        ALiBi's slope of each query head. It has no gradient, so it must not require one.
    deterministic : bool
        Make the backward pass give the same bits in every run, which costs time; the CPU path always does.
        torch.use_deterministic_algorithms(True) asks for it too.
    return_attn_probs : bool
        Return (out, lse, S_dmask), for tests. S_dmask is an empty tensor if dropout_p is 0. Otherwise it holds
        the probabilities, negative where they were dropped, in q's dtype. Its shape is (batch, num_heads,
        seqlen_q, seqlen_k), both lengths rounded up to a multiple of 128; it is 0 past them and has no gradient.
    s_aux : Tensor, (num_heads,), any of q's dtypes, optional
        Attention sinks: a score per query head that takes part in the softmax's denominator but has no value
        in v. It has a gradient.
    out : Tensor, (batch, seqlen_q, num_heads, head_dim_v), q's dtype, optional
        Receives the result; its last dimension has stride 1. It must not overlap q, k or v, and can't be given
        when a gradient is needed.
    return_softmax_lse : bool
        Return (out, lse). lse has a gradient.
    num_splits : int
        Into how many parts, up to 256, the keys are split for parallelism: a hint. 0 leaves the number to a
        heuristic, 1 makes a row's result independent of the batch around it. Dropout never splits.
    pack_gqa : bool, optional
        Whether the query heads of a key head share a tile: a hint, which changes nothing but the rounding of
        the result. None leaves it to a heuristic.

    Returns
    -------
    out : Tensor, (batch, seqlen_q, num_heads, head_dim_v), q's dtype
    lse : Tensor, (batch, num_heads, seqlen_q), float32 (float64 for float64 inputs)
        With return_softmax_lse or return_attn_probs: the natural logarithm of the softmax's denominator, sink
        included.
    S_dmask : Tensor
        With return_attn_probs.

    A row that sees no key gets out 0, lse -inf (or the sink's score, if there is one), and gradients of 0.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or breaks one of the rules above.
    NotImplementedError
        If no path serves this call; the message says why (see flash_attn.explain).

    References
    ----------
    FlashAttention (Dao et al. 2022, arXiv:2205.14135) and FlashAttention-2 (Dao 2023, arXiv:2307.08691), with
    online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867); grouped-query attention (Ainslie et al.
    2023, arXiv:2305.13245); ALiBi (Press et al. 2021, arXiv:2108.12409); softcap (Gemma 2, arXiv:2408.00118);
    sinks (Xiao et al. 2023, arXiv:2309.17453); Philox (Salmon et al., SC'11).
    """
    # Not through dense_call, which would put the options into one more dict: 1 of a small call's 20 microseconds.
    call = _checks.finish_call(
        q, k, v, _checks.dense_shapes(q, k, v), _checks.DENSE, dropout_p=dropout_p, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, return_attn_probs=return_attn_probs, s_aux=s_aux, out=out,
        return_softmax_lse=return_softmax_lse, num_splits=num_splits, pack_gqa=pack_gqa,
    )  # fmt: skip
    return run(call)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor, whose gradient is one tensor too. Nothing is copied.

    Parameters
    ----------
    qkv : Tensor, (batch, seqlen, 3, num_heads, head_dim)
        q, k and v, stacked in this order.
    dropout_p, softmax_scale, causal, ...
        All other parameters are `flash_attn_func`'s.

    Returns
    -------
    As `flash_attn_func`; out is (batch, seqlen, num_heads, head_dim).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flash_attn_func`.
    """
    call = _checks_packed.qkvpacked_call(
        qkv, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
        return_attn_probs=return_attn_probs, s_aux=s_aux, out=out, return_softmax_lse=return_softmax_lse,
        num_splits=num_splits, pack_gqa=pack_gqa,
    )  # fmt: skip
    return run(call)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
) -> Result:
    """`flash_attn_func` with k and v in one tensor, whose gradient is one tensor too. Nothing is copied.

    Parameters
    ----------
    q : Tensor, (batch, seqlen_q, num_heads, head_dim)
    kv : Tensor, (batch, seqlen_k, 2, num_heads_k, head_dim)
        k and v, stacked in this order.
    dropout_p, softmax_scale, causal, ...
        All other parameters are `flash_attn_func`'s.

    Returns
    -------
    As `flash_attn_func`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flash_attn_func`.
    """
    call = _checks_packed.kvpacked_call(
        q, kv, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
        return_attn_probs=return_attn_probs, s_aux=s_aux, out=out, return_softmax_lse=return_softmax_lse,
        num_splits=num_splits, pack_gqa=pack_gqa,
    )  # fmt: skip
    return run(call)


_CALLS: dict[Callable[..., Any], Callable[..., ForwardCall]] = {
    flash_attn_func: _checks.dense_call,
    flash_attn_qkvpacked_func: _checks_packed.qkvpacked_call,
    flash_attn_kvpacked_func: _checks_packed.kvpacked_call,
    flash_attn_varlen_func: _checks.varlen_call,
    flash_attn_varlen_qkvpacked_func: _checks_packed.varlen_qkvpacked_call,
    flash_attn_varlen_kvpacked_func: _checks_packed.varlen_kvpacked_call,
    flash_attn_with_kvcache: lambda **arguments: kvcache_call(**arguments).forward,
}


def build_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> ForwardCall:
    """The call that a public function would run with these arguments; nothing runs."""
    if not isinstance(function, Hashable) or function not in _CALLS:
        raise ValueError(f"function must be an attention function of flash_attn, got {function!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return _CALLS[function](**bound.arguments)
