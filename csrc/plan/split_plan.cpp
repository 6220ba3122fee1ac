#include "plan/split_plan.h"

#include <algorithm>
#include <limits>

#include "variant/varlen_tiles.h"

namespace flash_attn {
namespace {

constexpr int kRows16 = 16;
constexpr int kRows64 = 64;
// Registers, 120 a lane, leave room for no more.
constexpr int kMaxBlocksPerSm = 4;
// What the driver takes of an SM's shared memory for each block.
constexpr int kReservedSmem = 1024;
// Launches of so many times what the GPU holds at once are not split, and the others into about so many.
struct Waves {
  int64_t enough;
  int64_t target;
};

// Decoding lives on the memory's speed, which the last blocks of a launch must not leave unused. 64 rows need a
// workspace four times as large, and compute.
constexpr Waves waves_for(int tile_m) { return tile_m == kRows16 ? Waves{4, 2} : Waves{1, 1}; }

// Fewer keys than these take less time than the rest of a block's life.
constexpr int kMinKeysPerSplit = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t heads_per_kv(const Problem& problem) { return problem.num_heads / problem.num_heads_k; }

int64_t packed_heads_of(const Problem& problem) {
  const int64_t heads = heads_per_kv(problem);
  const bool fits = problem.rows_q * heads <= std::numeric_limits<int32_t>::max();
  return fits && problem.pack_gqa != PackGqa::kNever ? heads : 1;
}

// Keys that one row can see at most, and those that the other rows of an entry with so many queries see besides.
int64_t most_visible_keys(const Problem& problem, int64_t queries) {
  const int64_t rows_k = problem.rows_k;
  if (problem.window_left < 0 || problem.window_right < 0) return rows_k;
  return std::min(rows_k, std::min(problem.window_left, rows_k) + std::min(problem.window_right, rows_k) + queries);
}

}  // namespace

int64_t queries_per_entry(const Problem& problem) {
  if (problem.layout == Layout::kDense) return problem.rows_q;
  return ceil_div(problem.rows_q, std::max<int64_t>(problem.batch, 1));
}

Rows choose_rows(const Problem& problem) {
  // Dropout's numbers are drawn for neighbouring queries of one head.
  if (problem.has_dropout || !problem.allows_few_rows) return Rows::kMany;
  const bool forced = problem.num_splits > 1 || (problem.pack_gqa == PackGqa::kAlways && heads_per_kv(problem) > 1);
  // With one split a row's bits may not depend on the other entries: nor may the choice of the kernel.
  if (problem.num_splits == 1 && problem.layout == Layout::kVarlen) {
    return forced || problem.layout_k == Layout::kDense ? Rows::k64 : Rows::kMany;
  }
  const int64_t queries = queries_per_entry(problem);
  if (queries * packed_heads_of(problem) <= kRows16) return Rows::k16;
  return forced || queries <= kRows64 ? Rows::k64 : Rows::kMany;
}

SplitPlan make_split_plan(const Problem& problem, const Tile& tile, int smem_bytes, const Gpu& gpu) {
  SplitPlan plan;
  plan.packed_heads = static_cast<int>(packed_heads_of(problem));
  const int64_t packed_rows = problem.rows_q * plan.packed_heads;
  const int64_t row_tiles = problem.layout == Layout::kVarlen ? num_varlen_slots(packed_rows, problem.batch, tile.m)
                                                              : problem.batch * ceil_div(packed_rows, tile.m);
  const int64_t head_runs = problem.num_heads / plan.packed_heads;
  const int64_t blocks_per_sm = (gpu.smem_limit + kReservedSmem) / (smem_bytes + kReservedSmem);
  const Waves waves = waves_for(tile.m);
  const int64_t resident = gpu.num_sms * std::clamp<int64_t>(blocks_per_sm, 1, kMaxBlocksPerSm);
  plan.min_tiles = static_cast<int>(ceil_div(kMinKeysPerSplit, tile.n));
  const auto most_splits = [&](int64_t queries) {
    return ceil_div(ceil_div(most_visible_keys(problem, queries), tile.n) + 1, plan.min_tiles);
  };
  plan.num_splits = problem.num_splits;
  const bool is_short = most_splits(queries_per_entry(problem)) <= 1;
  if (problem.num_splits == 0 && (is_short || row_tiles * head_runs >= waves.enough * resident)) {
    plan.num_splits = 1;
  }
  plan.num_slots = row_tiles * std::max(plan.num_splits, 1);
  if (plan.num_splits == 0) {
    plan.target_slots = static_cast<int>(ceil_div(waves.target * resident, std::max<int64_t>(head_runs, 1)));
    // All queries of a packed batch may be one entry's: the grid must hold its splits, too.
    const int64_t most = std::min<int64_t>(most_splits(problem.rows_q), kMaxSplits);
    plan.num_slots = std::min(row_tiles + plan.target_slots, row_tiles * most);
  }
  return plan;
}

}  // namespace flash_attn
