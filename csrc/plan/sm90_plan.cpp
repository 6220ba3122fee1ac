#include "plan/sm90_plan.h"

#include <algorithm>

#include "plan/grid.h"
#include "plan/split_plan.h"

namespace flash_attn {
namespace {

// A warpgroup's rows: O is stored in boxes of as many, which must hold whole queries.
constexpr int64_t kMostPackedHeads = 64;

// Of the rows of an entry's tiles, how many hold a query.
double share_of_used_rows(int64_t rows, int tile_m) {
  return static_cast<double>(rows) / static_cast<double>(ceil_div(rows, tile_m) * tile_m);
}

}  // namespace

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

bool sm80_beats_sm90(const Problem& problem, const Tile& tile, const Gpu& gpu) {
  const Rows rows = choose_rows(problem);
  if (rows == Rows::k16) return true;
  const int packed_heads = packed_heads_on_sm90(problem, tile);
  const int64_t queries = queries_per_entry(problem);
  const int64_t rows_of_entry = queries * packed_heads;
  const int64_t num_tiles = ceil_div(rows_of_entry, tile.m) * problem.batch * (problem.num_heads / packed_heads);
  if (rows == Rows::kMany) {
    // Two of SM80's thread blocks, which an SM has room for, do half of what one of SM90's does in the same time: a
    // tile in four parts takes as long as a tile there. Merging the parts takes time, too.
    constexpr int64_t kBlocksPerSm = 2;
    constexpr int64_t kPartsThatPay = 6;
    return can_split(problem, rows) && num_tiles * kPartsThatPay <= gpu.num_sms * kBlocksPerSm &&
           most_splits(problem, rows, queries, tile.n) >= kPartsThatPay;
  }
  if (problem.is_batch_invariant()) return true;
  if (problem.pack_gqa == PackGqa::kAlways && packed_heads == 1 && problem.num_heads_per_kv() > 1) return true;
  // WGMMA does twice the work of mma.sync in the same time.
  constexpr double kEvenShare = 0.5;
  return num_tiles < gpu.num_sms ||
         share_of_used_rows(std::max<int64_t>(rows_of_entry, 1), tile.cluster_rows()) < kEvenShare;
}

}  // namespace flash_attn
