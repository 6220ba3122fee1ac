"""Which keys a row of queries sees, and the additive bias of a block of rows.

Both the window and ALiBi depend only on ``delta = j - (i + sk - sq)``. One vector over delta therefore
holds the bias of every block: a block is an overlapping view of it, and nothing of size rows x keys is ever
written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a block where the mask limits its keys. The kernel's tiles shrink below 192 rows; larger blocks waste more
# masked scores. Best or within 4 % of it among 64, 128, 192, 256 and 512, for windows of 64, 128 and 256 keys at S of
# 256, 512, 1024 and 4096 (one AVX-512 core, float32).
ROWS_PER_BLOCK = 192


class Block(NamedTuple):
    """Rows [i0, i1) and the keys [j0, j1) that at least one of them sees."""

    i0: int
    i1: int
    j0: int
    j1: int


class KeyRange(NamedTuple):
    """Row i sees keys i + offset - left ... i + offset + right, both inclusive, cut to [0, num_keys)."""

    num_rows: int
    num_keys: int
    left: int
    right: int

    @property
    def offset(self) -> int:
        return self.num_keys - self.num_rows

    @property
    def is_full(self) -> bool:
        return self.left >= self.num_keys - 1 and self.right >= self.num_rows - 1

    @property
    def is_square_causal(self) -> bool:
        return self.right == 0 and self.num_rows == self.num_keys and self.left >= self.num_keys - 1

    def block(self, i0: int, i1: int) -> Block:
        j0 = max(0, i0 + self.offset - self.left)
        j1 = min(self.num_keys, i1 + self.offset + self.right)
        return Block(i0, i1, j0, j1)

    def sees_all(self, block: Block) -> bool:
        """Whether every row of the block sees every key of the block."""
        return (
            block.i1 - 1 + self.offset - self.left <= block.j0 and block.i0 + self.offset + self.right >= block.j1 - 1
        )

    def blocks(self, rows: int) -> Iterator[Block]:
        for i0 in range(0, self.num_rows, rows):
            yield self.block(i0, min(i0 + rows, self.num_rows))

    def rows_per_block(self) -> int:
        if self.is_full:
            return self.num_rows
        # A short remainder costs a call of its own and saves little.
        return self.num_rows if self.num_rows < ROWS_PER_BLOCK * 3 // 2 else ROWS_PER_BLOCK


class Trimmed(NamedTuple):
    """A KeyRange in which every row sees a key and every key is seen, and what was cut off the front."""

    keys: KeyRange
    skipped_rows: int
    skipped_keys: int


def trim(num_rows: int, num_keys: int, window_left: int, window_right: int) -> Trimmed:
    """Cut the leading rows that see no key and the leading keys that no row sees.

    The alignment is at the bottom right, so cutting from the front changes no distance; and since both window
    sides are at least 0, no row or key at the end is ever without a partner.
    """
    left = window_left if 0 <= window_left < num_keys else num_keys
    right = window_right if 0 <= window_right < num_rows else num_rows
    skipped_rows = num_rows if num_keys == 0 else max(0, num_rows - num_keys - right)
    num_rows -= skipped_rows
    skipped_keys = num_keys if num_rows == 0 else max(0, num_keys - num_rows - left)
    num_keys -= skipped_keys
    return Trimmed(KeyRange(num_rows, num_keys, left, right), skipped_rows, skipped_keys)


class Bias:
    """Window and ALiBi as one vector over ``delta``, read as blocks whose rows run backwards.

    Entry (i', j) of a block is ``vector[i' + j + const]`` with i' counted from the block's last row: both
    strides are +1, which torch can express, whereas rows that run forwards would need a stride of -1.
    """

    def __init__(self, keys: KeyRange, rows: int, slopes: Tensor | None, dtype: torch.dtype, device: torch.device):
        self.keys = keys
        self.plain = slopes is None
        low = max(1 - keys.num_keys, 1 - keys.left - rows)
        high = min(keys.num_keys - 1 - keys.offset, keys.right + rows - 1)
        self.low = low
        delta = torch.arange(low, high + 1, device=device)
        hidden = (delta < -keys.left) | (delta > keys.right)
        if slopes is None:
            vector = torch.zeros(1, 1, delta.numel(), dtype=dtype, device=device)
        else:
            slopes = slopes.to(dtype)
            slopes = slopes[None, :, None] if slopes.dim() == 1 else slopes[:, :, None]
            vector = slopes * -delta.abs().to(dtype)
        self.vector = vector.masked_fill_(hidden, -torch.inf).contiguous()

    def backward_rows(self, block: Block) -> Tensor | None:
        """(1 or n, 1 or H, rows, keys) whose row 0 is the block's last row; None where all would be 0."""
        if self.plain and self.keys.sees_all(block):
            return None
        entries, heads, length = self.vector.shape
        start = block.j0 - (block.i1 - 1) - self.keys.offset - self.low
        return self.vector.as_strided(
            (entries, heads, block.i1 - block.i0, block.j1 - block.j0), (heads * length, length, 1, 1), start
        )

    def forward_rows(self, block: Block) -> Tensor | None:
        bias = self.backward_rows(block)
        return None if bias is None else bias.flip(-2)
