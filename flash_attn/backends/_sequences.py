"""Cut a call into pieces: batch entries of equal lengths, each with the rows and the keys it really uses.

Every layout (dense, packed with cu_seqlens, paged) becomes views of shape (entries, rows, heads, head_dim)
here, and nothing outside the used rows is ever read, so unused memory may hold anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._mask import KeyRange, trim


class Rows(NamedTuple):
    """Rows [low, high) of `slot` rows each, for consecutive batch entries."""

    packed: bool
    start: int  # first batch row (dense) or first token (packed)
    slot: int
    low: int
    high: int

    # One as_strided costs half of what the same view costs in steps, and decoding takes five views per entry.

    def of(self, tensor: Tensor, count: int) -> Tensor:
        """View (count, high - low, ...) of a (B, S, ...) or (T, ...) tensor."""
        shape, strides = tensor.shape, tensor.stride()
        if self.packed:
            shape, strides = (count, self.slot, *shape[1:]), (self.slot * strides[0], *strides)
            first = self.start * strides[1]
        else:
            first = self.start * strides[0]
        first += tensor.storage_offset() + self.low * strides[1]
        return tensor.as_strided((count, self.high - self.low, *shape[2:]), strides, first)

    def of_lse(self, lse: Tensor, count: int) -> Tensor:
        """View (count, H, high - low) of a (B, H, S) or (H, T) tensor."""
        heads, rows = lse.stride()[-2:]
        entries = self.slot * rows if self.packed else lse.stride()[0]
        first = lse.storage_offset() + self.low * rows + self.start * (rows if self.packed else entries)
        return lse.as_strided((count, lse.shape[-2], self.high - self.low), (entries, heads, rows), first)

    def after(self, entries: int) -> Rows:
        return self._replace(start=self.start + entries * (self.slot if self.packed else 1))


class PagedRows(NamedTuple):
    """Logical rows [low, high) of one entry, gathered from its pages."""

    pages: Tensor  # ids of the used pages only, int64, on the cache's device
    low: int
    high: int
    first_page: int

    def of(self, tensor: Tensor, count: int) -> Tensor:
        page_size = tensor.shape[1]
        gathered = tensor.index_select(0, self.pages).flatten(0, 1)
        shift = self.first_page * page_size
        return gathered[self.low - shift : self.high - shift].unsqueeze(0)


class Piece(NamedTuple):
    """Batch entries [batch, batch + count) that share their lengths."""

    batch: int
    count: int
    q_rows: Rows
    k_rows: Rows | PagedRows
    keys: KeyRange
    skipped_rows: Rows  # used rows of q that see no key; often empty
    first_row: int  # of q_rows, counted from the sequence's start: the dropout mask needs it
    first_key: int

    def parts(self, max_count: int) -> Iterator[Piece]:
        """The same entries, at most max_count at a time."""
        for done in range(0, self.count, max_count):
            rows = (rows.after(done) if done else rows for rows in (self.q_rows, self.k_rows, self.skipped_rows))
            q_rows, k_rows, skipped_rows = rows
            yield self._replace(
                batch=self.batch + done,
                count=min(max_count, self.count - done),
                q_rows=q_rows,
                k_rows=k_rows,
                skipped_rows=skipped_rows,
            )

    def slopes(self, alibi_slopes: Tensor | None) -> Tensor | None:
        if alibi_slopes is None or alibi_slopes.dim() == 1:
            return alibi_slopes
        return alibi_slopes[self.batch : self.batch + self.count]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# Those of the packed forms in parentheses.
_PACKED_NAMES = {"q": ("cu_seqlens_q (cu_seqlens)", "q (qkv)"), "k": ("cu_seqlens_k", "k (kv)")}


def starts_of(name: str, tensor_name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """cu_seqlens on the host, where its values are checked."""
    starts = cu_seqlens.tolist()
    _check(starts[0] == 0, f"{name} must start at 0, got {starts[0]}")
    for index, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
        _check(a <= b, f"{name} must not decrease, got {a} then {b} at index {index + 1}")
    _check(starts[-1] <= total, f"{name} must end within the {total} tokens of {tensor_name}, got {starts[-1]}")
    return starts


def _used(name: str, seqused: Tensor | None, slots: list[int]) -> list[int]:
    if seqused is None:
        return slots
    used = seqused.tolist()
    for index, (length, slot) in enumerate(zip(used, slots, strict=True)):
        _check(
            0 <= length <= slot,
            f"{name} must be between 0 and the capacity {slot}, got {length} at index {index}",
        )
    return used


def _entry_rows(name, tensor, cu_seqlens, seqused, used_name, count=None, index=None) -> list[Rows]:
    if cu_seqlens is not None:
        starts = starts_of(*_PACKED_NAMES[name], cu_seqlens, tensor.shape[0])
        slots = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    else:
        if index is None:
            starts = list(range(tensor.shape[0] if count is None else count))
        else:
            starts = cache_rows(index, "the cache's", tensor.shape[0])
        slots = [tensor.shape[1]] * len(starts)
    used = _used(used_name, seqused, slots)
    packed = cu_seqlens is not None
    return [Rows(packed, a, slot, 0, length) for a, slot, length in zip(starts, slots, used, strict=False)]


def cache_rows(cache_batch_idx: Tensor, whose: str, num_rows: int) -> list[int]:
    """The row of each entry, checked: of the cache, or with pages of block_table."""
    rows = cache_batch_idx.tolist()
    for index, row in enumerate(rows):
        _check(
            0 <= row < num_rows,
            f"cache_batch_idx must be at least 0 and below {whose} {num_rows} rows, got {row} at index {index}",
        )
    return rows


def _paged_rows(k: Tensor, block_table: Tensor, seqused_k: Tensor | None) -> list[tuple[int, list[int]]]:
    """The length of each entry and the ids of its pages, which are not checked: some may be out of every window."""
    page_size = k.shape[1]
    table = block_table.tolist()
    used = _used("seqused_k (cache_seqlens)", seqused_k, [block_table.shape[1] * page_size] * len(table))
    return [(length, ids[: -(-length // page_size)]) for length, ids in zip(used, table, strict=True)]


def _check_pages(ids: list[int], num_pages: int, index: int) -> None:
    for page in ids:
        _check(
            0 <= page < num_pages,
            f"block_table must hold ids of at least 0 and below {num_pages} for pages in use, "
            f"got {page} in row {index}",
        )


def _follows(a: Rows, b: Rows, distance: int) -> bool:
    step = distance * (a.slot if a.packed else 1)
    return b.start == a.start + step and (a.slot, a.low, a.high) == (b.slot, b.low, b.high)


def _whole(q: Tensor, k: Tensor, window_left: int, window_right: int) -> list[Piece]:
    entries, rows = q.shape[:2]
    return _pieces(
        0,
        entries,
        Rows(False, 0, rows, 0, rows),
        Rows(False, 0, k.shape[1], 0, k.shape[1]),
        window_left,
        window_right,
    )


def _pieces(batch, count, q_rows, k_rows, window_left, window_right) -> list[Piece]:
    num_rows = q_rows.high - q_rows.low
    if num_rows == 0 or count == 0:
        return []
    keys, skipped_rows, skipped_keys = trim(num_rows, k_rows.high - k_rows.low, window_left, window_right)
    return [
        Piece(
            batch,
            count,
            q_rows._replace(low=q_rows.low + skipped_rows),
            k_rows._replace(low=k_rows.low + skipped_keys),
            keys,
            q_rows._replace(high=q_rows.low + skipped_rows),
            skipped_rows,
            skipped_keys,
        )
    ]


def split(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    window_left: int,
    window_right: int,
) -> list[Piece]:
    """The pieces of a call, in batch order. Lengths are read on the host and checked."""
    layout = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, block_table, cache_batch_idx)
    if all(tensor is None for tensor in layout):
        return _whole(q, k, window_left, window_right)
    q_rows = _entry_rows("q", q, cu_seqlens_q, seqused_q, "seqused_q")
    leftpad = [0] * len(q_rows) if leftpad_k is None else leftpad_k.tolist()
    pieces: list[Piece] = []
    if block_table is not None:
        page_size = k.shape[1]
        if cache_batch_idx is not None:
            block_table = block_table[cache_rows(cache_batch_idx, "block_table's", block_table.shape[0])]
        for batch, (rows, (length, ids)) in enumerate(zip(q_rows, _paged_rows(k, block_table, seqused_k), strict=True)):
            low = _left_pad(leftpad[batch], length, batch)
            first_key = low + trim(rows.high, length - low, window_left, window_right).skipped_keys
            first_page = first_key // page_size
            _check_pages(ids[first_page:], k.shape[0], batch)
            pages = torch.tensor(ids[first_page:], dtype=torch.int64, device=k.device)
            k_rows = PagedRows(pages, low, length, first_page)
            pieces += _pieces(batch, 1, rows, k_rows, window_left, window_right)
        return pieces
    k_rows = _entry_rows("k", k, cu_seqlens_k, seqused_k, "seqused_k (cache_seqlens)", len(q_rows), cache_batch_idx)
    k_rows = [
        rows._replace(low=_left_pad(low, rows.high, index))
        for index, (rows, low) in enumerate(zip(k_rows, leftpad, strict=True))
    ]
    first = 0
    for batch in range(1, len(q_rows) + 1):
        if batch < len(q_rows):
            distance = batch - first
            if _follows(q_rows[first], q_rows[batch], distance) and _follows(k_rows[first], k_rows[batch], distance):
                continue
        pieces += _pieces(first, batch - first, q_rows[first], k_rows[first], window_left, window_right)
        first = batch
    return pieces


def _left_pad(low: int, length: int, index: int) -> int:
    _check(low >= 0, f"leftpad_k (cache_leftpad) must not be negative, got {low} at index {index}")
    # Padding of at least the whole length leaves no key: an idle slot of a captured batch looks like this.
    return min(low, length)


def covers(rows: Rows, count: int, tensor: Tensor) -> bool:
    """Whether these rows of `count` entries are all that a dense or packed tensor holds."""
    whole_slots = rows.start == 0 and rows.low == 0 and rows.high == rows.slot
    return whole_slots and count * (rows.slot if rows.packed else 1) == tensor.shape[0]
