// Which calls run in the kernels with few rows, and how those and others share keys out.
#pragma once

#include "plan/plan.h"

namespace flash_attn {

// A variable-length batch has their mean, not their maximum, which is a hint that may not change a result.
int64_t queries_per_entry(const Problem& problem);

Rows choose_rows(const Problem& problem);

// Parts of about `min_keys` or more that the keys of a tile with so many queries could be split into.
int64_t most_splits(const Problem& problem, int64_t queries, int tile_n, int min_keys);

// Whether the kernels that a call runs in could split its keys.
bool can_split(const Problem& problem, Rows rows);

SplitPlan make_split_plan(const Problem& problem, Rows rows, const Tile& tile, int smem_bytes, const Gpu& gpu);

}  // namespace flash_attn
