"""What other libraries import from FlashAttention-2's module of this name: for them, not for new code.

The public functions are those of `flash_attn`. The functions with an underscore are one pass each, which autograd does
not record; they have FlashAttention-2's arguments, and the semantics of `flash_attn`.
"""

from __future__ import annotations

from torch import Tensor

import flash_attn_2_cuda
from flash_attn import interface
from flash_attn.interface import *  # noqa: F403  (all public functions, the same objects)

__all__ = interface.__all__

flash_attn_gpu = flash_attn_cuda = flash_attn_2_cuda


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int | None,
    window_size_right: int | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass of `flash_attn_func` alone: autograd records nothing, whatever q, k and v require.

    Parameters
    ----------
    q, k, v, dropout_p, softmax_scale, causal, softcap, alibi_slopes
        As in `flash_attn_func`.
    window_size_left, window_size_right : int or None
        The sides of its window_size; negative or None is infinite.
    return_softmax : bool
        Return S_dmask, as its return_attn_probs does.

    Returns
    -------
    out : Tensor, (batch, seqlen_q, num_heads, head_dim_v), q's dtype
    softmax_lse : Tensor, (batch, num_heads, seqlen_q), float32 (float64 for float64 inputs)
        -inf for a row that sees no key, where FlashAttention-2 has +inf.
    S_dmask : Tensor
        Empty unless return_softmax and dropout_p > 0. FlashAttention-2 raises for return_softmax without dropout.
    rng_state : Tensor, (2,), int64
        The state of dropout's random numbers, for the backward pass. Without dropout it holds nothing of meaning.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flash_attn_func`.
    """
    return flash_attn_gpu.fwd(
        q, k, v, None, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        return_softmax, None,
    )  # fmt: skip


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass of `flash_attn_varlen_func` alone: autograd records nothing, whatever q, k and v require.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, leftpad_k, seqused_k
        As in `flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
        As in `_flash_attn_forward`.
    zero_tensors : bool
        Asks for out 0 and softmax_lse -inf in rows of no sequence. They always are, with False too.

    Returns
    -------
    out : Tensor, (total_q, num_heads, head_dim_v), q's dtype
    softmax_lse : Tensor, (num_heads, total_q), float32 (float64 for float64 inputs)
    S_dmask, rng_state : Tensor
        As in `_flash_attn_forward`; S_dmask has the shape that `flash_attn_varlen_func` gives it.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flash_attn_varlen_func`.
    """
    return flash_attn_gpu.varlen_fwd(
        q, k, v, None, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
        return_softmax, None,
    )  # fmt: skip


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int | None,
    window_size_right: int | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The backward pass of `flash_attn_func`, into memory of the caller's.

    Parameters
    ----------
    dout : Tensor, (batch, seqlen_q, num_heads, head_dim_v), q's dtype
        The gradient of out.
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
        What the forward pass got.
    out : Tensor, (batch, seqlen_q, num_heads, head_dim_v), q's dtype
    softmax_lse : Tensor, (batch, num_heads, seqlen_q), float32 (float64 for float64 inputs)
        What the forward pass returned. If k and v are a part of the keys, out and softmax_lse over all parts make
        dq, dk and dv this part's share. softmax_lse may also be transposed, as diffusers has it.
    dq, dk, dv : Tensor, of the shapes of q, k and v, q's dtype, optional
        Receive the gradients; their last dimension has stride 1. No two may overlap, nor dk or dv q, k, v or dout. One
        that is None is computed in vain.
    deterministic : bool
        As in `flash_attn_func`.
    rng_state : Tensor, (2,), int64
        What the forward pass returned. Needed, and read, only if dropout_p > 0.

    Returns
    -------
    softmax_d : Tensor, (batch, num_heads, seqlen_q), float32 (float64 for float64 inputs)
        The sum of dout * out over head_dim_v. FlashAttention-2 pads its last dimension.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        If an argument breaks one of the rules above, and as in `flash_attn_func`.
    """
    return flash_attn_gpu.bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, deterministic, None, rng_state,
    )[3]  # fmt: skip


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int | None,
    window_size_right: int | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """The backward pass of `flash_attn_varlen_func`, into memory of the caller's.

    Parameters
    ----------
    dout, out : Tensor, (total_q, num_heads, head_dim_v), q's dtype
    softmax_lse : Tensor, (num_heads, total_q), float32 (float64 for float64 inputs)
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        What the forward pass got.
    dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
        As in `_flash_attn_backward`, and so are deterministic and rng_state.
    zero_tensors : bool
        Asks for gradients of 0 in rows of no sequence. They always are, with False too.

    Returns
    -------
    softmax_d : Tensor, (num_heads, total_q), float32 (float64 for float64 inputs)
        The sum of dout * out over head_dim_v, 0 in rows of no sequence.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `_flash_attn_backward`.
    """
    return flash_attn_gpu.varlen_bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
        deterministic, None, rng_state,
    )[3]  # fmt: skip


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
