"""A paged KV cache: sequences take fixed-size pages from a common pool as they grow."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from model import Config


class PagedKVCache:
    """Pools of pages, one pair per layer, and a table that says which page holds which tokens.

    `k_pages` and `v_pages` are (layers, num_pages, page_size, kv_heads, head_dim); logical token t of entry b
    lies in page `block_table[b, t // page_size]`, row `t % page_size`. The pools start full of NaN and unused
    table slots hold -1: attention must read neither.
    """

    def __init__(
        self,
        config: Config,
        *,
        batch_size: int,
        max_length: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        pages_per_entry = math.ceil(max_length / page_size)
        num_pages = batch_size * pages_per_entry
        pool = (config.layers, num_pages, page_size, config.kv_heads, config.head_dim)
        self.page_size, self.max_length = page_size, max_length
        self.k_pages = torch.full(pool, math.nan, device=device, dtype=dtype)
        self.v_pages = torch.full(pool, math.nan, device=device, dtype=dtype)
        self.block_table = torch.full((batch_size, pages_per_entry), -1, device=device, dtype=torch.int32)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self._held = [0] * batch_size  # pages of each entry
        self._tokens = [0] * batch_size  # `lengths`, known to the host
        self._free = list(range(num_pages))
        random.Random(0).shuffle(self._free)  # pages of one sequence lie anywhere, as in a busy server

    def reserve(self, rows: slice, num_new: int) -> None:
        """Gives the entries `rows` the pages that `num_new` more tokens need."""
        for entry_idx in range(*rows.indices(len(self._held))):
            needed = math.ceil((self._tokens[entry_idx] + num_new) / self.page_size)
            if needed > self.block_table.shape[1]:
                raise ValueError(f"entry {entry_idx} would grow past max_length, {self.max_length}")
            for slot in range(self._held[entry_idx], needed):
                self.block_table[entry_idx, slot] = self._free.pop()
            self._held[entry_idx] = max(self._held[entry_idx], needed)

    def advance(self, rows: slice, num_new: int) -> None:
        """Counts `num_new` tokens that were written to each of the entries `rows`."""
        self.lengths[rows] += num_new
        for entry_idx in range(*rows.indices(len(self._tokens))):
            self._tokens[entry_idx] += num_new

    @property
    def pages_in_use(self) -> int:
        return sum(self._held)
