"""The CPU path: every feature of the ops, on any device, in memory linear in the sequence length.

A call is cut into pieces of equal lengths (`_sequences`), each computed by torch's CPU flash kernel
(`_flash`) or, for softcap, dropout and other devices, by plain tensor operations (`_math`). Sinks are added
to the pieces' results here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _flash, _math
from ._cache import append_kv, combine
from ._rotary import rotary
from ._sequences import Piece, covers, split

# Elements of q and k that backward holds in float32 at once, where the inputs have 16 bits: 64 MiB each way.
WIDENED_ELEMENTS = 1 << 24

__all__ = ["append_kv", "attn_probs", "backward", "combine", "forward", "rotary"]


def _without_autocast(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would round what was widened on purpose: the operands of matrix products."""

    @functools.wraps(compute)
    def run(*arguments: Any) -> Any:
        device_type = next(tensor for tensor in arguments if tensor is not None).device.type
        if not torch.is_autocast_enabled(device_type):
            return compute(*arguments)
        with torch.autocast(device_type, enabled=False):
            return compute(*arguments)

    return run


@_without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    scheduler_metadata: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    num_splits: int,
    pack_gqa: bool | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """out with q's layout and dtype, lse (B, H, Sq) or (H, Tq). Hints and maximal lengths change nothing.

    With num_splits = 1 each entry is computed by itself: together, how many there are decides how torch sums.
    """
    layout = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, block_table, cache_batch_idx)
    use_flash = _flash.supports(q, softcap, dropout_p)
    one_by_one = num_splits == 1
    if use_flash and alibi_slopes is None and not one_by_one and _is_dense(layout):
        result = _flash.forward_dense(q, k, v, window_left, window_right, softmax_scale)
        if result is not None:
            out, lse = result if s_aux is None else _with_sink(*result, s_aux)
            return _owned(out), lse.contiguous()

    def compute(piece: Piece) -> tuple[Tensor, Tensor]:
        q_piece = piece.q_rows.of(q, piece.count)
        k_piece, v_piece = piece.k_rows.of(k, piece.count), piece.k_rows.of(v, piece.count)
        slopes = piece.slopes(alibi_slopes)
        if use_flash:
            out, lse = _flash.forward(q_piece, k_piece, v_piece, piece.keys, slopes, softmax_scale)
        else:
            score = _math.Score(softmax_scale, softcap, slopes, dropout_p, rng_state)
            out, lse = _math.forward(piece, score, q_piece, k_piece, v_piece)
        return (out, lse) if s_aux is None else _with_sink(out, lse, s_aux)

    pieces = split(q, k, *layout, window_left, window_right)
    if one_by_one:
        pieces = [part for piece in pieces for part in piece.parts(1)]
    if len(pieces) == 1 and pieces[0].keys.num_rows and covers(pieces[0].q_rows, pieces[0].count, q):
        out, lse = compute(pieces[0])
        if cu_seqlens_q is not None:
            out = out.flatten(0, 1)
            lse = lse.transpose(0, 1).flatten(1)
        return _owned(out), lse.contiguous()
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = _empty_lse(q, cu_seqlens_q is not None)
    for piece in pieces:
        if piece.keys.num_rows:
            piece_out, piece_lse = compute(piece)
            piece.q_rows.of(out, piece.count).copy_(piece_out)
            piece.q_rows.of_lse(lse, piece.count).copy_(piece_lse)
        if s_aux is not None:
            piece.skipped_rows.of_lse(lse, piece.count).copy_(s_aux.to(lse.dtype)[:, None])
    return out, lse


def _owned(out: Tensor) -> Tensor:
    """Contiguous, and no view, since autograd refuses in-place operations on views that a function returns."""
    out = out.contiguous()
    return out.new_empty(0).set_(out) if out._is_view() else out


def _is_dense(layout: tuple[Tensor | None, ...]) -> bool:
    return all(tensor is None for tensor in layout)


def _empty_lse(q: Tensor, packed: bool) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_full(shape, -torch.inf, dtype=dtype)


def _with_sink(out: Tensor, lse: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    """One more key of score s_aux and value 0: it only enlarges the denominator."""
    total = torch.logaddexp(lse, s_aux.to(lse.dtype)[:, None])
    share = torch.exp(lse - total).transpose(1, 2).unsqueeze(-1)
    return (out * share).to(out.dtype), total


@_without_autocast
def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    s_aux: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, ds_aux. Every sum has a fixed order, so the result is deterministic either way."""
    layout = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, None, None, None)
    if dout is None:
        dout = torch.zeros_like(out)
    ds_aux = q.new_empty(0, dtype=torch.float32) if s_aux is None else _sink_gradient(dout, dlse, out, lse, s_aux)
    use_flash = _flash.supports(q, softcap, dropout_p)
    if use_flash and alibi_slopes is None and dlse is None and _is_dense(layout):
        grads = _flash.backward_dense(dout, q, k, v, out, lse, window_left, window_right, softmax_scale)
        if grads is not None:
            return (*grads, ds_aux)

    def compute(piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        count, rows = piece.count, piece.q_rows
        q_piece, out_piece, dout_piece = rows.of(q, count), rows.of(out, count), rows.of(dout, count)
        k_piece, v_piece = piece.k_rows.of(k, count), piece.k_rows.of(v, count)
        lse_piece = rows.of_lse(lse, count)
        dlse_piece = None if dlse is None else rows.of_lse(dlse, count)
        slopes = piece.slopes(alibi_slopes)
        tensors = (dout_piece, dlse_piece, q_piece, k_piece, v_piece, out_piece, lse_piece)
        if use_flash:
            return _flash.backward(*tensors, piece.keys, slopes, softmax_scale)
        return _math.backward(piece, _math.Score(softmax_scale, softcap, slopes, dropout_p, rng_state), *tensors)

    pieces = split(q, k, *layout, window_left, window_right)
    if q.itemsize == 2:
        pieces = [part for piece in pieces for part in piece.parts(_entries_to_widen(piece, q, k))]
    if len(pieces) == 1 and pieces[0].keys.num_rows and _covers_all(pieces[0], q, k):
        grads = zip(compute(pieces[0]), (q, k, v), strict=True)
        dq, dk, dv = (grad.to(x.dtype).contiguous().view(x.shape) for grad, x in grads)
        return dq, dk, dv, ds_aux
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for piece in pieces:
        if piece.keys.num_rows:
            piece_dq, piece_dk, piece_dv = compute(piece)
            piece.q_rows.of(dq, piece.count).copy_(piece_dq)
            piece.k_rows.of(dk, piece.count).copy_(piece_dk)
            piece.k_rows.of(dv, piece.count).copy_(piece_dv)
    return dq, dk, dv, ds_aux


def _entries_to_widen(piece: Piece, q: Tensor, k: Tensor) -> int:
    keys = piece.keys
    elements = keys.num_rows * q.shape[-2] * q.shape[-1] + keys.num_keys * k.shape[-2] * k.shape[-1]
    return max(1, WIDENED_ELEMENTS // max(1, elements))


def _covers_all(piece: Piece, q: Tensor, k: Tensor) -> bool:
    return covers(piece.q_rows, piece.count, q) and covers(piece.k_rows, piece.count, k)


def _sink_gradient(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, s_aux: Tensor) -> Tensor:
    delta = torch.linalg.vecdot(dout.to(lse.dtype), out.to(lse.dtype)).transpose(-1, -2)
    share = torch.exp(s_aux.to(lse.dtype)[:, None] - lse)
    grad = share * (-delta if dlse is None else dlse - delta)
    # Rows past seqused_q have no sink; what dout and out hold there must not count.
    grad = torch.where(lse == -torch.inf, 0, grad)
    return grad.sum(dim=[d for d in range(grad.dim()) if d != grad.dim() - 2]).to(s_aux.dtype)


@_without_autocast
def attn_probs(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
) -> Tensor:
    """exp(score - lse), negative where dropped, 0 outside: (B, H, rows, keys), both rounded up to 128."""
    layout = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, block_table, cache_batch_idx)
    pieces = split(q, k, *layout, window_left, window_right)
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    longest_q = max_seqlen_q if packed else q.shape[1]
    longest_k = k.shape[1] if block_table is None and cu_seqlens_k is None else max_seqlen_k
    used_q = max((piece.first_row + piece.keys.num_rows for piece in pieces), default=0)
    used_k = max((piece.first_key + piece.keys.num_keys for piece in pieces), default=0)
    for name, longest, used in (("max_seqlen_q (max_seqlen)", longest_q, used_q), ("max_seqlen_k", longest_k, used_k)):
        if used > longest:
            raise ValueError(f"{name} must be at least the longest length {used} for return_attn_probs, got {longest}")
    shape = (batch, q.shape[-2], -(-longest_q // 128) * 128, -(-longest_k // 128) * 128)
    probs = q.new_zeros(shape)
    for piece in pieces:
        if piece.keys.num_rows:
            count = piece.count
            score = _math.Score(softmax_scale, softcap, piece.slopes(alibi_slopes), dropout_p, rng_state)
            q_piece, k_piece = piece.q_rows.of(q, count), piece.k_rows.of(k, count)
            into = probs[piece.batch : piece.batch + count]
            _math.signed_probabilities(piece, score, q_piece, k_piece, piece.q_rows.of_lse(lse, count), into)
    return probs
