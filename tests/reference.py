"""The oracle: attention written out densely, one sequence at a time, with no regard to speed or memory.

It shares no code with the package. `attention(..., dtype=torch.float64)` is the truth that results are
compared with; the same function with `dtype=torch.bfloat16`, say, is the naive computation at low precision
whose error the tolerance rule (tolerance.py) takes as its measure. Gradients come from torch's autograd.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from tolerance import floor_unit

_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


class Attention(NamedTuple):
    out: torch.Tensor  # q's layout with v's head dim
    lse: torch.Tensor  # (B, H, Sq), or (H, Tq) for varlen
    probs: list  # per sequence (H, sq, sk): softmax before dropout, negative where dropped


class Sequence(NamedTuple):
    """What one batch entry really uses."""

    q: torch.Tensor  # (sq, H, D)
    k: torch.Tensor  # (sk, Hk, D)
    v: torch.Tensor  # (sk, Hk, Dv)
    slot: tuple  # where its rows of out and lse go


def philox_4x32_10(counter, key):
    """Philox-4x32-10 (Salmon et al. 2011): counter (..., 4) and key (2,) of 32-bit words -> (..., 4)."""
    c0, c1, c2, c3 = (np.asarray(counter, dtype=np.uint64)[..., word] for word in range(4))
    k0, k1 = (int(word) for word in key)
    for _ in range(_PHILOX_ROUNDS):
        p0 = c0 * np.uint64(_PHILOX_MULTIPLIERS[0])
        p1 = c2 * np.uint64(_PHILOX_MULTIPLIERS[1])
        high0, low0 = p0 >> np.uint64(32), p0 & np.uint64(_LOW_32)
        high1, low1 = p1 >> np.uint64(32), p1 & np.uint64(_LOW_32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _LOW_32
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _LOW_32
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def keep_mask(rng_state, dropout_p, batch_idx, num_heads, seqlen_q, seqlen_k):
    """The dropout rule, element by element: bool (H, sq, sk), True where a probability is kept."""
    seed, offset = (int(word) for word in rng_state.tolist())
    h, i, j = np.meshgrid(np.arange(num_heads), np.arange(seqlen_q), np.arange(seqlen_k), indexing="ij")
    counter = np.stack(
        (
            (j // 32) * 4 + (j % 8) // 2,
            (i // 16) * 8 + i % 8,
            (batch_idx * num_heads + h) & _LOW_32,
            np.full_like(h, offset & _LOW_32),
        ),
        axis=-1,
    )
    words = philox_4x32_10(counter, (seed & _LOW_32, (seed >> 32) & _LOW_32))
    byte_idx = ((i // 8) % 2) * 8 + ((j % 32) // 8) * 2 + j % 2
    word = np.take_along_axis(words, (byte_idx // 4)[..., None], axis=-1)[..., 0]
    byte = (word >> (8 * (byte_idx % 4)).astype(np.uint32)) & np.uint32(0xFF)
    return torch.from_numpy(byte <= math.floor(255 * (1 - dropout_p)))


def allowed_mask(seqlen_q, seqlen_k, causal=False, window_size=(-1, -1)):
    """Bool (sq, sk): i + sk - sq - left <= j <= i + sk - sq + right, aligned to the bottom right corner."""
    left, right = (None if side is None or side < 0 else int(side) for side in window_size)
    right = 0 if causal else right
    diagonal = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k)[None, :]
    allowed = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left is not None:
        allowed &= j >= diagonal - left
    if right is not None:
        allowed &= j <= diagonal + right
    return allowed


def _matmul(a, b):
    """a @ b, where 16-bit products are summed in float32 and rounded once, as on a GPU; in PyTorch's CPU kernels
    that is slow."""
    if a.dtype.itemsize > 2:
        return a @ b
    return (a.float() @ b.float()).to(a.dtype)


def attend(q, k, v, *, allowed, scale, softcap=0.0, slopes=None, sinks=None, keep=None, dropout_p=0.0):
    """One sequence: q (sq, H, D), k (sk, Hk, D), v (sk, Hk, Dv).

    Returns out (sq, H, Dv), lse (H, sq) and probs (H, sq, sk), the softmax, negative where dropped.

    A sink is one more key that every row may see, whose score is the sink and whose value is zero.
    """
    group = q.shape[1] // k.shape[1]
    q = q.transpose(0, 1)
    k, v = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))
    num_heads, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    scores = _matmul(q, k.transpose(1, 2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        distance = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)[None, :]
        scores = scores + (-slopes.double()[:, None, None] * distance.abs().double()).to(scores.dtype)
    allowed = allowed.expand(num_heads, seqlen_q, seqlen_k)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(num_heads, seqlen_q, 1)
        scores = torch.cat((scores, column), dim=-1)
        allowed = torch.cat((allowed, allowed.new_ones(num_heads, seqlen_q, 1)), dim=-1)
    # A row without any key gets scores of 0, so that softmax and its gradient are finite, and is masked
    # afterwards.
    dead = ~allowed.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~allowed, -math.inf).masked_fill(dead, 0.0)
    probs = torch.softmax(scores, dim=-1).masked_fill(dead, 0.0)[..., :seqlen_k]
    if scores.shape[-1] == 0:
        lse = scores.new_full((num_heads, seqlen_q), -math.inf)
    else:
        lse = torch.logsumexp(scores, dim=-1).masked_fill(dead[..., 0], -math.inf)
    dropped = probs if keep is None else probs * keep.to(probs.dtype) / (1 - dropout_p)
    signed = probs if keep is None else torch.where(keep, probs, -probs)
    return _matmul(dropped, v).transpose(0, 1), lse, signed


def gather_pages(pool, table_row, length):
    """The first `length` rows of one entry of a paged cache (num_pages, page, Hk, D); NaN where an id names no page."""
    page = pool.shape[1]
    no_page = torch.full_like(pool[0], math.nan) if len(pool) else None
    ids = [int(table_row[t]) for t in range(-(-length // page))]
    used = [pool[page_id] if 0 <= page_id < len(pool) else no_page for page_id in ids]
    return torch.cat(used)[:length] if used else pool[:0].flatten(0, 1)


def _at(values, entry, default):
    return default if values is None else int(values[entry])


def sequences(
    q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, leftpad_k=None,
    block_table=None, cache_batch_idx=None,
):  # fmt: skip
    """Cut dense, varlen or paged tensors into what each batch entry uses. Nothing else is ever read."""
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    found = []
    for entry in range(batch):
        if cu_seqlens_q is None:
            length_q, where = q.shape[1], entry
        else:
            start, end = int(cu_seqlens_q[entry]), int(cu_seqlens_q[entry + 1])
            length_q, where = end - start, start
        length_q = _at(seqused_q, entry, length_q)
        rows = q[where, :length_q] if cu_seqlens_q is None else q[where : where + length_q]
        slot = (where, length_q)
        first, row = _at(leftpad_k, entry, 0), _at(cache_batch_idx, entry, entry)
        if block_table is not None:
            last = block_table.shape[1] * k.shape[1]
            if cu_seqlens_k is not None:
                last = int(cu_seqlens_k[entry + 1]) - int(cu_seqlens_k[entry])
            last = _at(seqused_k, entry, last)
            keys, values = (gather_pages(x, block_table[row], last) for x in (k, v))
        elif cu_seqlens_k is not None:
            start, end = int(cu_seqlens_k[entry]), int(cu_seqlens_k[entry + 1])
            last = _at(seqused_k, entry, end - start)
            keys, values = (x[start : start + last] for x in (k, v))
        else:
            last = _at(seqused_k, entry, k.shape[1])
            keys, values = (x[row, :last] for x in (k, v))
        found.append(Sequence(rows, keys[first:], values[first:], slot))
    return found


def attention(
    q, k, v, *, dtype=torch.float64, causal=False, window_size=(-1, -1), softmax_scale=None, softcap=0.0,
    alibi_slopes=None, s_aux=None, dropout_p=0.0, rng_state=None, cu_seqlens_q=None, **layout,
):  # fmt: skip
    """Attention of dense q (B, Sq, H, D) or varlen q (Tq, H, D), computed on the CPU in `dtype`."""
    q, k, v = (x.cpu().to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    num_heads = q.shape[-2]
    # The empty sums tie the results to the inputs where no sequence uses them, so that gradients exist.
    nothing = sum(x[..., :0].sum() for x in (q, k, v))
    out = q.new_zeros(*q.shape[:-1], v.shape[-1]) + nothing
    lse_shape = (q.shape[0], num_heads, q.shape[1]) if cu_seqlens_q is None else (num_heads, q.shape[0])
    lse = q.new_full(lse_shape, -math.inf) + nothing
    all_probs = []
    for entry, seq in enumerate(sequences(q, k, v, cu_seqlens_q=cu_seqlens_q, **layout)):
        seqlen_q, seqlen_k = seq.q.shape[0], seq.k.shape[0]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[entry]
        keep = None
        if dropout_p > 0:
            keep = keep_mask(rng_state, dropout_p, entry, num_heads, seqlen_q, seqlen_k)
        allowed = allowed_mask(seqlen_q, seqlen_k, causal, window_size)
        # A key that no row sees may hold anything, whose product with a probability of 0 might be NaN.
        unseen = ~allowed.any(dim=0)[:, None, None]
        keys, values = seq.k.masked_fill(unseen, 0.0), seq.v.masked_fill(unseen, 0.0)
        one_out, one_lse, probs = attend(
            seq.q, keys, values, allowed=allowed, scale=scale,
            softcap=softcap, slopes=None if slopes is None else slopes.cpu(), keep=keep, dropout_p=dropout_p,
            sinks=None if s_aux is None else s_aux.cpu(),
        )  # fmt: skip
        where, length = seq.slot
        if cu_seqlens_q is None:
            out[where, :length] = one_out
            lse[where, :, :length] = one_lse
        else:
            out[where : where + length] = one_out
            lse[:, where : where + length] = one_lse
        all_probs.append(probs)
    return Attention(out, lse, all_probs)


def rotate(x, cos, sin, positions, interleaved):
    """Rotary embedding of x (s, H, D) at positions (s,); cos and sin are (positions, rotary_dim / 2)."""
    half = cos.shape[-1]
    cos, sin = (table.to(x.dtype)[positions][:, None, :] for table in (cos, sin))
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    turned = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def cache_row(cache, entry, position, block_table=None, cache_batch_idx=None):
    """Index of the cache row that holds absolute position `position` of batch entry `entry`."""
    row = _at(cache_batch_idx, entry, entry)
    if block_table is not None:
        page = cache.shape[1]
        return int(block_table[row, position // page]), position % page
    return row, position


def append(cache, new, starts, **layout):
    """A copy of `cache` with new[b] (sn, Hk, D) written at positions starts[b] and up."""
    cache = cache.clone()
    for entry, tokens in enumerate(new):
        for t in range(tokens.shape[0]):
            cache[cache_row(cache, entry, int(starts[entry]) + t, **layout)] = tokens[t].to(cache.dtype)
    return cache


def combine(out_partial, lse_partial):
    """Merge splits: out (s, B, S, H, D) and lse (s, B, S, H) -> out (B, S, H, D) and lse (B, S, H)."""
    lse = torch.logsumexp(lse_partial, dim=0)
    weights = torch.exp(lse_partial - lse.masked_fill(lse == -math.inf, 0.0))
    # 0 * NaN is NaN: a split that saw no key may hold anything.
    return (weights[..., None] * out_partial.masked_fill(weights[..., None] == 0, 0.0)).sum(dim=0), lse


def _exponent_sizes(q, k, v, softmax_scale=None, softcap=0.0, s_aux=None, **options):
    """The relative error of a row of P that a rounding of S or LSE makes, in the floor's units: (..., H, 1).

    It is a unit of rounding of the row's largest scale |q| |k|, the sum of the sizes of S's terms.
    """
    scale = abs(q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    lse = attention(q.detach().abs(), k.detach().abs(), v.detach(), softmax_scale=scale, **options).lse
    eps = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    return lse.abs().nan_to_num(posinf=0.0).movedim(-1, -2)[..., None] * (eps / floor_unit(q.dtype))


def output_magnitude(q, k, v, **options):
    """How large the terms are that roundings act on in O: P |v|, whose relative error is P's (_exponent_sizes)."""
    return attention(q, k, v.abs(), **options).out * _exponent_sizes(q, k, v, **options)


def gradient_magnitudes(q, k, v, dout, dlse=None, **options):
    """How large the terms are that roundings act on, for each gradient, where they may exceed the gradient itself.

    Some cancel, and a rounding of them survives in the result, however small that is.
    dS = P * (dP - delta) with delta = sum_d dO O, and O has been rounded. A relative error u of O is an error
    of about u * delta_size in every dS of its row, where delta_size = ||dO * O||; carried on to dq it is
    scale * delta_size * P |k|, and likewise for dk. Dropout enters O alone: P is what softmax gave.

    The others are exponents. P = exp(S - LSE), both of them rounded, and what P errs by (_exponent_sizes) every
    gradient does. It counts where the gradients are as precise as S and LSE.

    The size of a term is the error that it causes, in units of the floor that the gradient's dtype has.
    """
    plain_q, plain_k = q.detach().double().cpu(), k.detach().double().cpu()
    s_aux = options.get("s_aux")
    sinks = None if s_aux is None else s_aux.detach().double().cpu()
    options |= {"s_aux": sinks}
    scale = abs(q.shape[-1] ** -0.5 if options.get("softmax_scale") is None else options["softmax_scale"])
    out, lse, _ = attention(plain_q, plain_k, v.detach(), **options)
    options |= {"dropout_p": 0.0}
    size = (dout.double().cpu() * out).norm(dim=-1, keepdim=True)
    if dlse is not None:
        size = size + dlse.double().cpu().movedim(-1, -2).abs().nan_to_num()[..., None]
    exponent = _exponent_sizes(q, k, v, **options)
    weights = scale * size * (1 + exponent)
    key_size = plain_k.abs().requires_grad_()
    seen = attention(plain_q, plain_k, key_size, **options).out
    (dk,) = torch.autograd.grad(seen, key_size, (weights * plain_q.abs()).nan_to_num())
    value = plain_k.new_zeros(v.shape).requires_grad_()
    arriving = (exponent * dout.double().cpu().abs()).nan_to_num()
    (dv,) = torch.autograd.grad(attention(plain_q, plain_k, value, **options).out, value, arriving)
    sizes = {"dq": weights * seen.detach(), "dk": dk, "dv": dv}
    if sinks is not None:
        sink_probs = torch.exp(sinks[:, None] - lse).masked_fill(lse == -math.inf, 0.0)
        terms = sink_probs * (size * (1 + exponent))[..., 0].movedim(-1, -2)
        # Roundings of different rows are independent, so they add up in quadrature.
        total = terms.norm(dim=-1) if terms.dim() == 2 else terms.norm(dim=(0, -1))
        sizes["ds_aux"] = total * (floor_unit(q.dtype) / floor_unit(s_aux.dtype))
    return sizes
