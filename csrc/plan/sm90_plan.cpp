#include "plan/sm90_plan.h"

#include <algorithm>

#include "plan/grid.h"
#include "plan/split_plan.h"
#include "variant/rounding.h"

namespace flash_attn {
namespace {

// A warpgroup's rows: O is stored in boxes of as many, which must hold whole queries.
constexpr int64_t kMostPackedHeads = 64;

// The share of the rows of an entry's tiles that hold a query.
double share_of_used_rows(int64_t rows, int tile_m) {
  return static_cast<double>(rows) / static_cast<double>(round_up(rows, tile_m));
}

// If the entries of a variable-length batch have about as many queries each.
int64_t count_likely_tiles(const Problem& problem, const Tile& tile, int packed_heads) {
  const int64_t head_runs = problem.num_heads / packed_heads;
  return ceil_div(queries_per_entry(problem) * packed_heads, tile.m) * problem.batch * head_runs;
}

// How many query heads of a key-value head share a tile of rows, or those of a cluster: one, all, or as many of them as
// a tile can take.
int packed_heads_on_sm90(const Problem& problem, const Tile& tile) {
  const int64_t group = problem.num_heads_per_kv();
  const bool is_power_of_two = (group & (group - 1)) == 0;
  const int64_t heads = std::min(group, kMostPackedHeads);
  const bool fits = problem.rows_q * heads <= kMaxRows;
  if (!is_power_of_two || !fits || problem.pack_gqa == PackGqa::kNever) return 1;
  if (problem.pack_gqa == PackGqa::kAlways) return static_cast<int>(heads);
  if (problem.is_batch_invariant()) return 1;
  // Boxes of several heads are shorter runs of memory: not for nothing.
  constexpr double kWorthIt = 0.9;
  const int64_t queries = std::max<int64_t>(queries_per_entry(problem), 1);
  const double unpacked = share_of_used_rows(queries, tile.cluster_rows());
  return unpacked < kWorthIt * share_of_used_rows(queries * heads, tile.cluster_rows()) ? static_cast<int>(heads) : 1;
}

}  // namespace

SplitPlan split_plan_on_sm90(const Problem& problem, const Tile& tile, const Gpu& gpu) {
  SplitPlan plan{.packed_heads = packed_heads_on_sm90(problem, tile)};
  if (tile.cluster > 1 || !can_split(problem, Rows::kMany)) return plan;
  plan.num_splits = problem.num_splits;
  if (plan.num_splits == 0) {
    // 128 rows and so many keys take some 20 microseconds, of which the merge must be a small part.
    constexpr int kKeysOfAPart = 2048;
    const int64_t num_tiles = count_likely_tiles(problem, tile, plan.packed_heads);
    const int64_t most = most_splits(problem, queries_per_entry(problem), tile.n, kKeysOfAPart);
    // Rows that belong to no entry have no keys to split.
    const int64_t splits = num_tiles == 0 ? 1 : std::min<int64_t>({gpu.num_sms / num_tiles, most, kMaxSplits});
    plan.num_splits = static_cast<int>(std::max<int64_t>(splits, 1));
  }
  plan.num_slots = count_tiles(problem.layout, problem.rows_q * plan.packed_heads, problem.batch, tile.m) *
                   problem.num_tile_runs() * plan.num_splits;
  return plan;
}

bool sm80_beats_sm90(const Problem& problem, const Tile& tile, const Gpu& gpu) {
  if (problem.num_splits > 1 && tile.cluster > 1) return true;
  const Rows rows = choose_rows(problem);
  if (rows != Rows::k64) return rows == Rows::k16;
  if (problem.is_batch_invariant()) return true;
  const SplitPlan split = split_plan_on_sm90(problem, tile, gpu);
  const bool packs = split.packed_heads > 1 || problem.num_heads_per_kv() == 1;
  if (problem.pack_gqa == PackGqa::kAlways && !packs) return true;
  // WGMMA does twice the work of mma.sync in the same time.
  constexpr double kEvenShare = 0.5;
  constexpr double kShareOfSms = 0.75;
  const int64_t rows_of_entry = std::max<int64_t>(queries_per_entry(problem) * split.packed_heads, 1);
  const auto num_parts = static_cast<double>(count_likely_tiles(problem, tile, split.packed_heads) * split.num_splits);
  // With num_splits = 1 the batch must not decide which kernel computes a row.
  const bool leaves_sms_idle = problem.num_splits != 1 && num_parts < kShareOfSms * gpu.num_sms;
  return leaves_sms_idle || share_of_used_rows(rows_of_entry, tile.cluster_rows()) < kEvenShare;
}

}  // namespace flash_attn
