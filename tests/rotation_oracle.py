"""The oracle of flash_attn.layers.rotary: complex numbers in float64, and the sizes of its tests."""

import torch

BATCH, SEQLEN, HEADS, HEAD_DIM, ROWS = 3, 7, 2, 24, 40
LENGTHS = (4, 0, 7)
CU_SEQLENS = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
OFFSETS = torch.tensor([5, 0, 21], dtype=torch.int32)


def tables(rotary_dim, dtype=torch.float64, rows=ROWS):
    angles = torch.outer(
        torch.arange(rows, dtype=torch.float64), 100.0 ** -torch.linspace(0, 1, rotary_dim // 2).double()
    )
    return angles.cos().to(dtype), angles.sin().to(dtype)


def expected(x, cos, sin, positions, interleaved, conjugate=False):
    """Token by token: a pair of columns is a complex number, which cos + i sin turns."""
    result = x.double().clone()
    rotary_dim = 2 * cos.shape[1]
    for token, position in positions.items():
        turn = torch.complex(cos[position].double(), sin[position].double())
        columns = result[token][:, :rotary_dim]
        a, b = (columns[:, 0::2], columns[:, 1::2]) if interleaved else columns.chunk(2, dim=-1)
        turned = torch.complex(a, b) * (turn.conj() if conjugate else turn)
        parts = (turned.real, turned.imag)
        result[token][:, :rotary_dim] = torch.stack(parts, dim=-1).flatten(1) if interleaved else torch.cat(parts, -1)
    return result


def positions_of(packed, offsets):
    """{token: position}"""
    offsets = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * BATCH
    if not packed:
        return {(b, i): offsets[b] + i for b in range(BATCH) for i in range(SEQLEN)}
    starts = CU_SEQLENS.tolist()
    return {(starts[b] + i,): offsets[b] + i for b in range(BATCH) for i in range(LENGTHS[b])}


X, COS, SIN = torch.randn(BATCH, SEQLEN, HEADS, HEAD_DIM), *tables(HEAD_DIM, torch.float32)
