#include "plan/backward_plan.h"

#include <sstream>

#include "plan/grid.h"

namespace flash_attn {

// SM80's kernels serve later GPUs too, after either architecture's forward.
BackwardPlan make_backward_plan(const Problem& problem, int smem_limit) {
  constexpr Arch arch = Arch::kSm80;
  const Score score = score_of(problem);
  const BackwardTileRow* row = find_backward_tile_row(arch, score, problem.head_dim, problem.head_dim_v, smem_limit);
  if (row == nullptr) refuse_head_dims(problem, arch, "backward kernel", smem_limit);
  const BackwardTile& tile = row->tile;
  const BackwardVariant variant{arch, problem.dtype, row->head_dim, row->smem, score};
  const int64_t key_tiles = count_tiles(problem.layout_k, problem.rows_k, problem.batch, tile.n);
  const int64_t query_tiles = count_tiles(problem.layout, problem.rows_q, problem.batch, tile.m);
  const int64_t key_runs = problem.num_heads_k * (problem.layout_k == Layout::kDense ? problem.batch : 1);
  const int64_t query_runs = problem.num_heads * problem.num_tile_runs();
  const int64_t num_query_blocks = query_tiles * query_runs * tile.column_blocks;
  BackwardPlan plan{.variant = variant,
                    .tile = tile,
                    .key_tiles_per_head = key_tiles,
                    .query_tiles_per_head = query_tiles,
                    .num_key_blocks = key_tiles * key_runs * tile.column_blocks,
                    .num_query_blocks = num_query_blocks,
                    .num_dq_sums = query_tiles * query_runs * tile.m * row->head_dim.qk,
                    .num_dq_counters = num_query_blocks,
                    .num_threads = num_threads(tile),
                    .smem_bytes = smem_bytes(variant)};
  check_num_blocks("k", plan.num_key_blocks);
  check_num_blocks("q", plan.num_query_blocks);
  return plan;
}

std::ostream& operator<<(std::ostream& json, const BackwardPlan& plan) {
  return json << "{\"arch\": " << static_cast<int>(plan.variant.arch)                //
              << ", \"dtype\": \"" << name_of(plan.variant.dtype) << "\""            //
              << ", \"head_dim\": " << plan.variant.head_dim.qk                      //
              << ", \"head_dim_v\": " << plan.variant.head_dim.v                     //
              << ", \"score\": \"" << name_of(plan.variant.score) << "\""            //
              << ", \"tile_m\": " << plan.tile.m << ", \"tile_n\": " << plan.tile.n  //
              << ", \"num_threads\": " << plan.num_threads                           //
              << ", \"smem_bytes\": " << plan.smem_bytes                             //
              << ", \"num_blocks\": " << plan.num_key_blocks                         //
              << ", \"workspace_bytes\": " << (plan.num_dq_sums + plan.num_dq_counters) * 4 << "}";
}

std::string describe(const BackwardPlan& plan) {
  std::ostringstream json;
  json << plan;
  return json.str();
}

}  // namespace flash_attn
