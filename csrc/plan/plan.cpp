#include "plan/plan.h"

#include <span>
#include <sstream>

#include "plan/grid.h"
#include "plan/sm90_plan.h"
#include "plan/split_plan.h"

namespace flash_attn {
namespace {

// The general score and few rows, and SM80's pages and splits, are compiled with the general mask only, which is as
// good as any other where most of the time goes into the score or the loads.
Mask mask_of(const Problem& problem, Arch arch, Rows rows) {
  const bool all_left = problem.window_left < 0 || problem.window_left >= problem.rows_k;
  const bool pages_need_it = problem.has_pages && arch == Arch::kSm80;
  if (rows != Rows::kMany || score_of(problem) == Score::kGeneral || pages_need_it || !all_left) return Mask::kGeneral;
  if (problem.window_right < 0) return Mask::kFull;
  return problem.window_right == 0 ? Mask::kCausal : Mask::kGeneral;
}

// Calls that split keys run in the general mask's kernel, on tiles that were chosen by their own mask.
constexpr bool serve_every_mask(std::span<const TileRow> rows) {
  for (const TileRow& row : rows) {
    if (row.masks != MaskSet::kAll) return false;
  }
  return true;
}
static_assert(serve_every_mask(kForwardTilesSm80), "the general mask's kernel may have another tile than the plan");

// Whose kernel serves a call.
Arch serving_arch(const Problem& problem, Arch preferred, const Gpu& gpu) {
  if (preferred != Arch::kSm90) return preferred;
  if (problem.has_dropout || problem.pages_need_sm80()) return Arch::kSm80;
  const TileRow* row = find_tile_row(Arch::kSm90, Rows::kMany, mask_of(problem, Arch::kSm90, Rows::kMany),
                                     problem.head_dim, problem.head_dim_v, gpu.smem_limit);
  return row != nullptr && sm80_beats_sm90(problem, row->tile, gpu) ? Arch::kSm80 : Arch::kSm90;
}

}  // namespace

Plan make_plan(const Problem& problem, Arch preferred, const Gpu& gpu) {
  const Arch arch = serving_arch(problem, preferred, gpu);
  const Rows rows = arch == Arch::kSm80 ? choose_rows(problem) : Rows::kMany;
  const TileRow* row =
      find_tile_row(arch, rows, mask_of(problem, arch, rows), problem.head_dim, problem.head_dim_v, gpu.smem_limit);
  if (row == nullptr) refuse_head_dims(problem, arch, "kernel", gpu.smem_limit);
  const int smem = smem_bytes(arch, row->head_dim, row->tile);
  SplitPlan split;
  if (arch == Arch::kSm90) {
    split = split_plan_on_sm90(problem, row->tile, gpu);
  } else if (can_split(problem, rows)) {
    split = make_split_plan(problem, rows, row->tile, smem, gpu);
  }
  const bool split_on_sm80 = arch == Arch::kSm80 && split.needs_merge();
  const Mask mask = split_on_sm80 ? Mask::kGeneral : mask_of(problem, arch, rows);
  const Variant variant{arch, problem.dtype, row->head_dim, row->smem, mask, score_of(problem), rows};
  const int64_t head_runs = problem.num_heads / split.packed_heads;
  const int64_t packed_rows = problem.rows_q * split.packed_heads;
  const bool by_slots = rows != Rows::kMany;
  const int64_t tiles_per_head =
      by_slots ? 0 : count_tiles(problem.layout, packed_rows, problem.batch, row->tile.cluster_rows());
  const int64_t num_blocks =
      by_slots ? split.num_slots * head_runs
               : tiles_per_head * row->tile.cluster * head_runs * problem.num_tile_runs() * split.num_splits;
  check_num_blocks("q", num_blocks);
  return {.variant = variant,
          .tile = row->tile,
          .tiles_per_head = tiles_per_head,
          .num_blocks = num_blocks,
          .num_threads = num_threads(arch, row->tile),
          .smem_bytes = smem,
          .split = split};
}

std::ostream& operator<<(std::ostream& json, const Plan& plan) {
  return json << "{\"arch\": " << static_cast<int>(plan.variant.arch)                //
              << ", \"dtype\": \"" << name_of(plan.variant.dtype) << "\""            //
              << ", \"head_dim\": " << plan.variant.head_dim.qk                      //
              << ", \"head_dim_v\": " << plan.variant.head_dim.v                     //
              << ", \"mask\": \"" << name_of(plan.variant.mask) << "\""              //
              << ", \"score\": \"" << name_of(plan.variant.score) << "\""            //
              << ", \"rows\": \"" << name_of(plan.variant.rows) << "\""              //
              << ", \"tile_m\": " << plan.tile.m << ", \"tile_n\": " << plan.tile.n  //
              << ", \"num_threads\": " << plan.num_threads                           //
              << ", \"smem_bytes\": " << plan.smem_bytes                             //
              << ", \"num_blocks\": " << plan.num_blocks                             //
              << ", \"packed_heads\": " << plan.split.packed_heads                   //
              << ", \"num_splits\": " << plan.split.num_splits                       //
              << ", \"target_slots\": " << plan.split.target_slots                   //
              << ", \"min_tiles\": " << plan.split.min_tiles << "}";
}

std::string describe(const Plan& plan) {
  std::ostringstream json;
  json << plan;
  return json.str();
}

}  // namespace flash_attn
