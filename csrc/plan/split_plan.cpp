#include "plan/split_plan.h"

#include <algorithm>

#include "plan/grid.h"
#include "variant/rounding.h"

namespace flash_attn {
namespace {

constexpr int kRows16 = 16;
constexpr int kRows64 = 64;
// Bytes of an SM's shared memory that the driver reserves for each block.
constexpr int kReservedSmem = 1024;

// How kernels of one kind share keys out. Waves are launches of as many thread blocks as the GPU holds at once.
struct Sharing {
  int max_blocks_per_sm;  // for which there are registers
  double waves_enough;    // launches of more are not split
  double waves_wanted;    // the others into about so many
  int min_keys;           // of a part: fewer take less time than the rest of a block's life
};

constexpr Sharing sharing_of(Rows rows) {
  switch (rows) {
    case Rows::k16:
      // Decoding lives on the memory's speed, which the last blocks of a launch must not leave unused. Lengths differ,
      // and one block with a long request can outlast ten waves of blocks with short ones.
      return {.max_blocks_per_sm = 4, .waves_enough = 16, .waves_wanted = 2, .min_keys = 256};
    case Rows::k64:
      // A workspace four times as large, and time that goes into computing.
      return {.max_blocks_per_sm = 4, .waves_enough = 1, .waves_wanted = 1, .min_keys = 256};
    default:
      // Two parts of each tile must fit at once. 128 rows and 1024 keys take some 15 microseconds, of which the merge
      // must be a small part.
      return {.max_blocks_per_sm = 2, .waves_enough = 0.5, .waves_wanted = 1, .min_keys = 1024};
  }
}

int64_t packed_heads_of(const Problem& problem) {
  const int64_t heads = problem.num_heads_per_kv();
  const bool fits = problem.rows_q * heads <= kMaxRows;
  return fits && problem.pack_gqa != PackGqa::kNever ? heads : 1;
}

// Tiles of keys that the rows of an entry with so many queries can see at most: one row sees the window, and the others
// some besides.
int64_t most_key_tiles(const Problem& problem, int64_t queries, int tile_n) {
  const int64_t rows_k = problem.rows_k;
  const int64_t tiles = ceil_div(rows_k, tile_n);
  if (problem.window_left < 0 || problem.window_right < 0) return tiles;
  const int64_t keys = std::min(problem.window_left, rows_k) + std::min(problem.window_right, rows_k) + queries;
  return std::min(tiles, ceil_div(keys, tile_n) + 1);  // a window begins and ends inside tiles
}

}  // namespace

int64_t most_splits(const Problem& problem, int64_t queries, int tile_n, int min_keys) {
  return ceil_div(most_key_tiles(problem, queries, tile_n), ceil_div(min_keys, tile_n));
}

int64_t queries_per_entry(const Problem& problem) {
  if (problem.layout == Layout::kDense) return problem.rows_q;
  return ceil_div(problem.rows_q, std::max<int64_t>(problem.batch, 1));
}

Rows choose_rows(const Problem& problem) {
  // Dropout's numbers are drawn for neighbouring queries of one head.
  if (problem.has_dropout || !problem.allows_few_rows) return Rows::kMany;
  const bool packs = problem.pack_gqa == PackGqa::kAlways && problem.num_heads_per_kv() > 1;
  if (problem.is_batch_invariant()) {
    return packs || problem.layout_k == Layout::kDense ? Rows::k64 : Rows::kMany;
  }
  const int64_t queries = queries_per_entry(problem);
  if (queries * packed_heads_of(problem) <= kRows16) return Rows::k16;
  return packs || queries <= kRows64 ? Rows::k64 : Rows::kMany;
}

bool can_split(const Problem& problem, Rows rows) {
  if (rows != Rows::kMany) return true;
  const bool may_split = problem.allows_few_rows || problem.num_splits > 1;
  return may_split && !problem.has_dropout && problem.num_splits != 1;
}

SplitPlan make_split_plan(const Problem& problem, Rows rows, const Tile& tile, int smem_bytes, const Gpu& gpu) {
  SplitPlan plan;
  plan.packed_heads = rows == Rows::kMany ? 1 : static_cast<int>(packed_heads_of(problem));
  const int64_t packed_rows = problem.rows_q * plan.packed_heads;
  const int64_t row_tiles = count_tiles(problem.layout, packed_rows, problem.batch, tile.m) * problem.num_tile_runs();
  const int64_t head_runs = problem.num_heads / plan.packed_heads;
  const Sharing sharing = sharing_of(rows);
  const int64_t blocks_per_sm = (gpu.smem_limit + kReservedSmem) / (smem_bytes + kReservedSmem);
  const int64_t wave = gpu.num_sms * std::clamp<int64_t>(blocks_per_sm, 1, sharing.max_blocks_per_sm);
  plan.min_tiles = static_cast<int>(ceil_div(sharing.min_keys, tile.n));
  // Where lengths vary, row_tiles bounds their number, and this is what it will be about.
  const int64_t queries = queries_per_entry(problem);
  const int64_t likely_row_tiles = problem.batch * ceil_div(queries * plan.packed_heads, tile.m);
  const double waves = static_cast<double>(likely_row_tiles * head_runs) / static_cast<double>(wave);
  plan.num_splits = problem.num_splits;
  const bool is_enough = waves > sharing.waves_enough || waves == 0.0;
  if (problem.num_splits == 0 && (most_splits(problem, queries, tile.n, sharing.min_keys) <= 1 || is_enough)) {
    plan.num_splits = 1;
  } else if (problem.num_splits == 0 && rows == Rows::kMany) {
    // Their registers leave no room for sharing out by lengths, and they have the shapes of prefilling: one request's
    // chunk, or several of a kind.
    plan.num_splits =
        static_cast<int>(std::min<int64_t>({most_splits(problem, queries, tile.n, sharing.min_keys), kMaxSplits,
                                            static_cast<int64_t>(sharing.waves_wanted / waves)}));
  }
  plan.num_slots = row_tiles * std::max(plan.num_splits, 1);
  if (plan.num_splits == 0) {
    const double target = sharing.waves_wanted * static_cast<double>(wave) / std::max<double>(head_runs, 1);
    plan.target_slots = std::max(static_cast<int>(target), 1);
    // All queries of a packed batch may be one entry's: the grid must hold its splits, too.
    const int64_t most = std::min<int64_t>(most_splits(problem, problem.rows_q, tile.n, sharing.min_keys), kMaxSplits);
    plan.num_slots = std::min(row_tiles + plan.target_slots, row_tiles * most);
  }
  return plan;
}

}  // namespace flash_attn
