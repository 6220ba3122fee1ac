"""Attention of one piece in plain tensor operations: any device, softcap and dropout included.

Scores exist for one block of entries and rows at a time, in float32 (float64 for float64), so that temporary
memory is bounded by a budget however long the sequence is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._mask import ROWS_PER_BLOCK, Bias, Block
from ._philox import keep_mask
from ._sequences import Piece

# Scores alive at once. A few tensors of this size exist together: 1M float32 is 4 MiB each. 4M was no faster.
SCORE_BUDGET = 1 << 20


@dataclass(frozen=True, slots=True)
class Score:
    """How scores and probabilities are made."""

    scale: float
    softcap: float
    slopes: Tensor | None
    dropout_p: float
    rng_state: Tensor | None

    @property
    def kept_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p)


class Workspace:
    """One piece's queries, keys and bias, and the walk over its blocks."""

    def __init__(self, piece: Piece, score: Score, q: Tensor, k: Tensor):
        self.piece, self.score, self.q = piece, score, q
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.heads, self.heads_kv = q.shape[2], k.shape[2]
        self.k = k.to(self.dtype).transpose(1, 2)
        keys = piece.keys
        self.rows = min(keys.rows_per_block(), ROWS_PER_BLOCK)
        per_row = self.heads * keys.num_keys
        self.rows = max(1, min(self.rows, SCORE_BUDGET // per_row))
        self.entries = max(1, min(q.shape[0], SCORE_BUDGET // (per_row * self.rows)))
        self.bias = Bias(keys, self.rows, score.slopes, self.dtype, q.device)

    def blocks(self) -> Iterator[tuple[slice, Block]]:
        for first in range(0, self.q.shape[0], self.entries):
            for block in self.piece.keys.blocks(self.rows):
                yield slice(first, min(first + self.entries, self.q.shape[0])), block

    def fold(self, rows: Tensor) -> Tensor:
        """(n, rows, H, X) -> (n, Hk, H/Hk * rows, X): heads of one KV head become rows of one product."""
        rows = rows.to(self.dtype).transpose(1, 2)
        return rows.reshape(rows.shape[0], self.heads_kv, -1, rows.shape[-1])

    def unfold(self, rows: Tensor, num_rows: int) -> Tensor:
        """The inverse of fold, as (n, H, rows, X)."""
        return rows.reshape(rows.shape[0], self.heads, num_rows, rows.shape[-1])

    def scores(self, entries: slice, block: Block) -> tuple[Tensor, Tensor | None]:
        """Scores (n, H, rows, keys) with bias and mask, and tanh(score / softcap) where softcap is used."""
        q = self.fold(self.q[entries, block.i0 : block.i1]) * self.score.scale
        keys = self.k[entries, :, block.j0 : block.j1]
        scores = self.unfold(q @ keys.transpose(-1, -2), block.i1 - block.i0)
        tanh = None
        if self.score.softcap > 0.0:
            tanh = torch.tanh(scores / self.score.softcap)
            scores = tanh * self.score.softcap
        bias = self.bias.forward_rows(block)
        if bias is not None:
            scores = scores + (bias if bias.shape[0] == 1 else bias[entries])
        return scores, tanh

    def keep(self, entries: slice, block: Block) -> Tensor | None:
        if self.score.dropout_p == 0.0:
            return None
        batch = self.piece.batch
        row, key = self.piece.first_row, self.piece.first_key
        return keep_mask(
            self.score.rng_state,
            self.score.dropout_p,
            range(batch + entries.start, batch + entries.stop),
            self.heads,
            range(row + block.i0, row + block.i1),
            range(key + block.j0, key + block.j1),
        )


def forward(piece: Piece, score: Score, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (n, rows, H, Dv) in q's dtype and lse (n, H, rows), without the sink."""
    work = Workspace(piece, score, q, k)
    v = v.to(work.dtype).transpose(1, 2)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=work.dtype)
    for entries, block in work.blocks():
        scores, _ = work.scores(entries, block)
        block_lse = torch.logsumexp(scores, dim=-1)
        p = torch.softmax(scores, dim=-1)  # exp(scores - block_lse) would hold the rounding of a large block_lse
        keep = work.keep(entries, block)
        if keep is not None:
            p.mul_(keep).mul_(score.kept_scale)
        block_out = p.view(p.shape[0], work.heads_kv, -1, p.shape[-1]) @ v[entries, :, block.j0 : block.j1]
        rows = slice(block.i0, block.i1)
        out[entries, rows] = work.unfold(block_out, block.i1 - block.i0).transpose(1, 2)
        lse[entries, :, rows] = block_lse
    return out, lse


def backward(
    piece: Piece,
    score: Score,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in float32 or float64, (n, rows, heads, head_dim)."""
    work = Workspace(piece, score, q, k)
    v = v.to(work.dtype).transpose(1, 2)
    dq = torch.empty_like(q, dtype=work.dtype, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(work.k, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for entries, block in work.blocks():
        rows, span = slice(block.i0, block.i1), slice(block.j0, block.j1)
        num_rows = block.i1 - block.i0
        scores, tanh = work.scores(entries, block)
        p = scores.sub_(lse[entries, :, rows].unsqueeze(-1)).exp_()
        do, o = work.fold(dout[entries, rows]), work.fold(out[entries, rows])
        delta = work.unfold((do * o).sum(-1, keepdim=True), num_rows)
        if dlse is not None:
            delta = delta - dlse[entries, :, rows].unsqueeze(-1)
        dp = work.unfold(do @ v[entries, :, span].transpose(-1, -2), num_rows)
        keep = work.keep(entries, block)
        p_kept = p
        if keep is not None:
            dp.mul_(keep).mul_(score.kept_scale)
            p_kept = p * keep * score.kept_scale
        ds = dp.sub_(delta).mul_(p)
        if tanh is not None:
            ds.mul_(1 - tanh * tanh)
        ds = ds.view(ds.shape[0], work.heads_kv, -1, ds.shape[-1])
        p_kept = p_kept.view_as(ds)
        q_block = work.fold(q[entries, rows])
        dv[entries, :, span] += p_kept.transpose(-1, -2) @ do
        dk[entries, :, span] += (ds.transpose(-1, -2) @ q_block) * score.scale
        dq_block = (ds @ work.k[entries, :, span]) * score.scale
        dq[entries, rows] = work.unfold(dq_block, num_rows).transpose(1, 2)
    return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def signed_probabilities(piece: Piece, score: Score, q: Tensor, k: Tensor, lse: Tensor, into: Tensor) -> None:
    """Write exp(score - lse), negative where dropped, to `into`: (n, H, rows, keys), untrimmed."""
    work = Workspace(piece, score, q, k)
    row, key = piece.first_row, piece.first_key
    for entries, block in work.blocks():
        scores, _ = work.scores(entries, block)
        p = scores.sub_(lse[entries, :, block.i0 : block.i1].unsqueeze(-1)).exp_()
        keep = work.keep(entries, block)
        if keep is not None:
            p = torch.where(keep, p, -p)
        into[entries, :, row + block.i0 : row + block.i1, key + block.j0 : key + block.j1] = p
