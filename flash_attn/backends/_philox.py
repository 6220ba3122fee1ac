"""The dropout mask: Philox-4x32-10 (Salmon et al., 'Parallel random numbers: as easy as 1, 2, 3', SC'11).

One counter yields the 16 bytes of two rows and eight columns of a 16 x 32 tile: the scores a GPU lane holds
there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TILE_ROWS = 16
_TILE_COLS = 32


def _multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product; int64 wraps, so the masks make it unsigned again."""
    product = value * constant
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Four output words for counters and keys of 32-bit values held in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _LOW
        k1 = (k1 + _KEY_STEPS[1]) & _LOW
    return [c0, c1, c2, c3]


def keep_mask(
    rng_state: Tensor,
    dropout_p: float,
    batch: range,
    num_heads: int,
    rows: range,
    cols: range,
) -> Tensor:
    """Bool (len(batch), num_heads, len(rows), len(cols)): True where the probability is kept.

    Rows and columns count from the start of the sequence's used queries and keys.
    """
    device = rng_state.device
    row_tiles = range(rows.start // _TILE_ROWS, -(-rows.stop // _TILE_ROWS))
    col_tiles = range(cols.start // _TILE_COLS, -(-cols.stop // _TILE_COLS))

    def counters(low: int, high: int) -> Tensor:
        return torch.arange(low, high, device=device) & _LOW

    c0 = counters(col_tiles.start * 4, col_tiles.stop * 4)
    c1 = counters(row_tiles.start * 8, row_tiles.stop * 8)[:, None]
    c2 = counters(batch.start * num_heads, batch.stop * num_heads)[:, None, None]
    seed, offset = rng_state.unbind()
    words = philox((c0, c1, c2, offset & _LOW), (seed & _LOW, (seed >> 32) & _LOW))
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape)
    packed = torch.stack([word.expand(shape).to(torch.int32) for word in words], dim=-1).view(torch.int16)
    # Each 16-bit unit holds two neighbouring columns; they move together.
    # (entry and head, row tile, row in 8, col tile, col pair, row half, col octet)
    lanes = packed.view(-1, len(row_tiles), 8, len(col_tiles), 4, 2, 4)
    tiles = lanes.permute(0, 1, 5, 2, 3, 6, 4).contiguous().view(torch.uint8)
    tiles = tiles.view(len(batch), num_heads, len(row_tiles) * _TILE_ROWS, len(col_tiles) * _TILE_COLS)
    top = rows.start - row_tiles.start * _TILE_ROWS
    edge = cols.start - col_tiles.start * _TILE_COLS
    return tiles[:, :, top : top + len(rows), edge : edge + len(cols)] <= math.floor(255 * (1 - dropout_p))
