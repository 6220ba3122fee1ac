#include "plan/grid.h"

#include "plan/plan.h"
#include "variant/rounding.h"
#include "variant/varlen_tiles.h"

namespace flash_attn {

int64_t count_tiles(Layout layout, int64_t rows, int64_t batch, int tile_rows) {
  if (layout == Layout::kVarlen) return num_varlen_slots(rows, batch, tile_rows);
  return ceil_div(rows, tile_rows);
}

void check_num_blocks(const char* name, int64_t num_blocks) {
  // Half of what a grid can have: persistent blocks count on, up to twice as far, before they see the end.
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  if (num_blocks <= kMostBlocks) return;
  throw UnsupportedProblem(std::string(name) + ": a launch has at most " + std::to_string(kMostBlocks) +
                           " tiles, got " + std::to_string(num_blocks));
}

void refuse_head_dims(const Problem& problem, Arch arch, const std::string& what, int smem_limit) {
  throw UnsupportedProblem("head_dim: no SM" + std::to_string(static_cast<int>(arch)) + " " + what + " for " +
                           std::to_string(problem.head_dim) + "/" + std::to_string(problem.head_dim_v) + " in " +
                           std::to_string(smem_limit / 1024) + " KB of shared memory");
}

}  // namespace flash_attn
