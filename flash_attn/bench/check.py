"""A case's tensors, and whether an output is right: a slice of it against plain attention in float32 or float64."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_attn.bench.suites import DTYPES, Case, Window

# Relative error of a slice, ||out - reference|| / ||reference||. In 16 bits: a rounding of P and one of O, each of at
# most half a unit in the last place, doubled. In 32 and 64: sums in another order.
ERROR_LIMITS = {"fp16": 2 * 2**-10, "bf16": 2 * 2**-7, "fp32": 1e-5, "fp64": 1e-12}
WORST_ROW = 4  # a single row may err by so many times the limit
DROPOUT_TOLERANCE = 0.1
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Inputs:
    q: Tensor  # (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim)
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dout: Tensor | None = None
    cache_seqlens: Tensor | None = None
    pages: tuple[Tensor, Tensor] | None = None  # k and v, (num_pages, page, heads_k, head_dim)
    block_table: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    error: float  # relative, over the whole slice
    wrong: str | None  # why the output is wrong


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.title.encode()))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator, dtype=torch.float32)

    lead = [(sum(case.lengths),)] * 2 if case.lengths else [(case.batch, n) for n in (case.seqlen_q, case.seqlen_k)]
    q = random(*lead[0], case.heads, case.head_dim).to(DTYPES[case.dtype])
    k = random(*lead[1], case.heads_k, case.head_dim).to(DTYPES[case.dtype])
    v = random(*lead[1], case.heads_k, case.head_dim_v).to(DTYPES[case.dtype])
    lengths = torch.tensor((0, *(case.lengths or [case.seqlen_q] * case.batch)), device=device)
    slopes = None
    if case.alibi:  # the slopes of the ALiBi paper, for a power of two of heads
        slopes = torch.pow(2.0, -8.0 * (torch.arange(case.heads, device=device) + 1) / case.heads)
    sinks = random(case.heads) if case.sinks else None
    inputs = Inputs(q, k, v, lengths.cumsum(0).to(torch.int32), slopes, sinks)
    if case.backward:
        dout = random(*lead[0], case.heads, case.head_dim_v).to(DTYPES[case.dtype])
        return replace(inputs, **{name: getattr(inputs, name).requires_grad_() for name in "qkv"}, dout=dout)
    if case.cached:
        full = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=device)
        inputs = replace(inputs, cache_seqlens=full)
    return _in_pages(case, inputs, generator) if case.page else inputs


def _in_pages(case: Case, inputs: Inputs, generator: torch.Generator) -> Inputs:
    """k and v in pages that lie in random order."""
    device = inputs.k.device
    width = -(-case.seqlen_k // case.page)
    places = torch.randperm(case.batch * width, device=device, generator=generator).view(case.batch, width)
    pools = []
    for x in (inputs.k, inputs.v):
        pool = x.new_empty(case.batch * width, case.page, *x.shape[2:])
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, width * case.page - case.seqlen_k))
        pool[places.flatten()] = padded.view(case.batch * width, case.page, *x.shape[2:])
        pools.append(pool)
    return replace(inputs, pages=tuple(pools), block_table=places.to(torch.int32))


def hidden_pairs(seqlen_q: int, seqlen_k: int, sides: Window, device: torch.device, rows: Tensor | None = None):
    """Bool (rows, seqlen_k), True where the mask hides a key; all rows by default."""
    rows = torch.arange(seqlen_q, device=device) if rows is None else rows
    distance = torch.arange(seqlen_k, device=device) - (rows[:, None] + seqlen_k - seqlen_q)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    left, right = sides
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return hidden


def alibi_bias(slopes: Tensor, seqlen_q: int, seqlen_k: int, rows: Tensor | None = None) -> Tensor:
    """(heads, rows, seqlen_k)."""
    rows = torch.arange(seqlen_q, device=slopes.device) if rows is None else rows
    distance = torch.arange(seqlen_k, device=slopes.device) - (rows[:, None] + seqlen_k - seqlen_q)
    return -slopes[:, None, None] * distance.abs()


@dataclass(frozen=True)
class Reference:
    """What an implementation's output must hold in one batch entry, the longest, and in the first and last heads."""

    case: Case
    entry: int
    heads: tuple[int, ...]
    out: Tensor  # (seqlen_q, heads, head_dim_v)

    def judge(self, out: Tensor) -> Verdict:
        case = self.case
        tokens = (sum(case.lengths),) if case.lengths else (case.batch, case.seqlen_q)
        if out.shape != (*tokens, case.heads, case.head_dim_v):
            return Verdict(math.nan, f"shape {tuple(out.shape)}")
        ours, exact = case.rows_of(out, self.entry)[:, list(self.heads)].to(self.out.dtype), self.out
        if case.dropout_p:
            return _judge_dropout(ours, exact, case.dropout_p)
        difference = (ours - exact).norm(dim=(1, 2))
        error = float(difference.norm() / exact.norm())
        worst = float((difference / exact.norm(dim=(1, 2)).clamp(min=1e-30)).max())
        limit = ERROR_LIMITS[case.dtype]
        if not error <= limit:
            return Verdict(error, f"relative error {error:.1e} over {limit:.1e}")
        if not worst <= WORST_ROW * limit:
            return Verdict(error, f"a row's relative error {worst:.1e} over {WORST_ROW * limit:.1e}")
        return Verdict(error, None)


def _judge_dropout(ours: Tensor, exact: Tensor, dropout_p: float) -> Verdict:
    """The masks differ, so the noise is judged: no bias, and of variance p / (1 - p) of the output's.

    That holds for values of mean 0, where many keys share the weight: for the second half of the rows.
    """
    half = ours.shape[0] // 2
    ours, exact = ours[half:], exact[half:]
    error = float((ours - exact).norm() / exact.norm())
    scale = float((ours * exact).sum() / exact.square().sum())
    expected = math.sqrt(dropout_p / (1 - dropout_p))
    if not abs(scale - 1) <= dropout_p * expected:
        return Verdict(error, f"dropout scales the output by {scale:.3f}")
    if not abs(error / expected - 1) <= DROPOUT_TOLERANCE:
        return Verdict(error, f"dropout's noise is {error:.3f} of the output, expected {expected:.3f}")
    return Verdict(error, None)


def make_reference(case: Case, inputs: Inputs) -> Reference:
    """In the wide dtype, a block of rows at a time."""
    wide = wide_dtype(inputs.q)
    heads = tuple(sorted({0, case.heads - 1}))
    heads_k = [head // (case.heads // case.heads_k) for head in heads]
    entry = case.checked_entry
    q, k, v = (
        case.rows_of(x, entry)[:, of_heads].to(wide).transpose(0, 1)
        for x, of_heads in ((inputs.q, list(heads)), (inputs.k, heads_k), (inputs.v, heads_k))
    )
    out = torch.cat([block for _, block in rows_of_blocks(case, inputs, heads, q, k, v)], dim=1)
    return Reference(case, entry, heads, out.transpose(0, 1))


def wide_dtype(x: Tensor) -> torch.dtype:
    """Float32 on a GPU, float64 on the CPU."""
    return torch.float32 if x.is_cuda else torch.float64


def rows_of_blocks(
    case: Case, inputs: Inputs, heads: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, group: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, their output) of block after block; k and v serve `group` heads of q each."""
    for rows in torch.arange(q.shape[1], device=q.device).split(_ROWS_AT_ONCE):
        keys, values = (x.repeat_interleave(group, dim=0) if group > 1 else x for x in (k, v))
        yield rows, _rows(case, inputs, heads, rows, q, keys, values)


def _rows(case: Case, inputs: Inputs, heads: tuple[int, ...], rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(heads, rows, head_dim_v): attention as its definition reads; q, k and v are (heads, seqlen, head_dim)."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    scores = q[:, rows] @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.alibi:
        scores = scores + alibi_bias(inputs.alibi_slopes[list(heads)], seqlen_q, seqlen_k, rows)
    scores = scores.masked_fill(hidden_pairs(seqlen_q, seqlen_k, case.sides, q.device, rows), -torch.inf)
    if case.sinks:
        sinks = inputs.sinks[list(heads), None, None].to(scores.dtype)
        probs = torch.cat([scores, sinks.expand(-1, len(rows), 1)], dim=-1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    return probs @ v
