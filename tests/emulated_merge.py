"""The kernel that merges the parts of split keys, emulated, on workspaces that no attention kernel has filled.

Head dims for each way in which lanes share a row, parts that saw no key, rows that none saw, entries in one part, and
rows enough that a thread block has several. From tests/, as emulated.py.
"""

import ctypes
import math
from dataclasses import dataclass

import pytest
import reference
import torch
from tolerance import assert_close

import flash_attn

NAN = math.nan


@dataclass(frozen=True)
class Merge:
    """One launch: as many rows and splits as each entry has, packed if `packed_rows`; else the rows are equal."""

    rows: tuple[int, ...]
    splits: tuple[int, ...]
    head_dim: int
    num_heads: int = 3
    packed_heads: int = 1
    tile_m: int = 16
    num_splits: int = 0  # what the launch knows
    has_sinks: bool = False
    packed_rows: bool = False
    dtype: torch.dtype = torch.bfloat16


MERGES = {
    "8-columns": Merge((3, 3), (2, 5), 8),
    "64-columns": Merge((5, 5, 5), (4, 1, 9), 64, has_sinks=True, dtype=torch.float16),
    "72-columns": Merge((2, 2), (3, 33), 72, num_heads=4, packed_heads=4),
    "128-columns": Merge((7, 0, 18), (40, 1, 3), 128, packed_rows=True, has_sinks=True),
    "136-columns": Merge((1,), (256,), 136, num_heads=8, packed_heads=2),
    "256-columns": Merge((5, 1), (3, 8), 256, packed_rows=True, dtype=torch.float16),
    "512-columns": Merge((2, 2), (5, 2), 512, num_heads=2),
    "fixed": Merge((3, 17), (2, 2), 40, num_splits=2, packed_rows=True),
    "many-rows": Merge((4300,), (2,), 72, num_heads=1, tile_m=128, num_splits=2),
    "many-short-rows": Merge((4300,), (2,), 8, num_heads=2, tile_m=128, num_splits=2, has_sinks=True),
}


@pytest.mark.parametrize("name", MERGES)
def test_merge(name):
    merge = MERGES[name]
    generator = torch.Generator().manual_seed(len(name))
    total = sum(merge.rows)
    num_tiles = [-(-rows * merge.packed_heads // merge.tile_m) for rows in merge.rows]
    first_slots, num_slots = [], 0
    for tiles, splits in zip(num_tiles, merge.splits, strict=True):
        first_slots.append(num_slots)
        num_slots += tiles * splits
    runs = merge.num_heads // merge.packed_heads
    part_o = torch.full((num_slots, runs, merge.tile_m, merge.head_dim), NAN)
    part_lse = torch.full((num_slots, runs, merge.tile_m), NAN)
    # Poisoned, with columns and rows between those that are written.
    buffer = torch.full((total, merge.num_heads + 1, merge.head_dim + 8), NAN, dtype=merge.dtype)
    lse = torch.full((merge.num_heads, total), NAN)
    sinks = torch.randn(merge.num_heads, generator=generator) if merge.has_sinks else None
    expected = []
    first_row = 0
    for entry, (rows, splits) in enumerate(zip(merge.rows, merge.splits, strict=True)):
        parts = torch.randn(splits, rows, merge.num_heads, merge.head_dim, generator=generator)
        parts_lse = 3 * torch.randn(splits, rows, merge.num_heads, generator=generator)
        unseen = torch.rand(splits, rows, merge.num_heads, generator=generator) < 0.3
        unseen[:, : rows // 3, 0] = True
        parts[unseen], parts_lse[unseen] = NAN, -math.inf
        for row in range(rows):
            for head in range(merge.num_heads) if splits > 1 else ():
                packed = row * merge.packed_heads + head % merge.packed_heads
                place = head // merge.packed_heads, packed % merge.tile_m
                first = first_slots[entry] + packed // merge.tile_m
                slots = first + num_tiles[entry] * torch.arange(splits)
                part_o[slots, place[0], place[1]] = parts[:, row, head]
                part_lse[slots, place[0], place[1]] = parts_lse[:, row, head]
        expected.append((slice(first_row, first_row + rows), parts, parts_lse))
        first_row += rows
    _launch(merge, buffer, lse, part_o, part_lse, first_slots, sinks)

    out = buffer[:, :-1, :-8]
    assert buffer[:, -1].isnan().all() and buffer[:, :, -8:].isnan().all()
    for rows, parts, parts_lse in expected:
        if len(parts) == 1:  # its results are there already
            assert out[rows].isnan().all() and lse[:, rows].isnan().all()
            continue
        exact, low = (_merged(parts, parts_lse, sinks, dtype) for dtype in (torch.float64, torch.float32))
        assert_close("out", out[rows], exact[0], low[0].to(merge.dtype))
        assert_close("lse", lse[:, rows].T, exact[1], low[1])


def _merged(parts, parts_lse, sinks, dtype):
    """A sink is a part whose values are 0."""
    if sinks is not None:
        parts = torch.cat((parts, torch.zeros_like(parts[:1])))
        parts_lse = torch.cat((parts_lse, sinks.expand_as(parts_lse[:1])))
    return reference.combine(parts.to(dtype), parts_lse.to(dtype))


def _launch(merge, buffer, lse, part_o, part_lse, first_slots, sinks):
    batch = len(merge.rows)
    entries = torch.tensor(list(zip(first_slots, merge.splits, strict=True)), dtype=torch.int32)
    cu_seqlens = None
    rows_q, batch_stride = merge.rows[0], merge.rows[0] * buffer.stride(0)
    if merge.packed_rows:
        cu_seqlens = torch.tensor([0, *merge.rows], dtype=torch.int32).cumsum(0).to(torch.int32)
        rows_q, batch_stride = sum(merge.rows), 0
    lse_of_launch = lse if merge.packed_rows or batch == 1 else torch.full((batch, merge.num_heads, rows_q), NAN)
    sizes = torch.tensor([
        batch, rows_q, merge.num_heads, merge.head_dim, merge.packed_heads, len(part_lse), merge.num_splits,
        merge.tile_m, batch_stride, buffer.stride(0), buffer.stride(1), merge.dtype == torch.float16,
    ])  # fmt: skip
    tensors = (buffer, lse_of_launch, part_o, part_lse, entries, sinks, cu_seqlens, sizes)
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    assert ctypes.CDLL(flash_attn._C.__file__).flash_attn_merge_splits(*pointers) == 0
    if lse_of_launch is not lse:
        lse.copy_(lse_of_launch.transpose(0, 1).reshape(lse.shape))
