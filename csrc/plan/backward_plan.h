// Problem -> BackwardPlan: which backward kernel runs, over which grid, with what workspace. Pure functions.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>

#include "plan/problem.h"
#include "variant/backward_tiles.h"

namespace flash_attn {

struct BackwardPlan {
  BackwardVariant variant;
  BackwardTile tile;
  // Tiles of one head. Variable lengths are not known to the host, so these bound their number (varlen_tiles.h).
  int64_t key_tiles_per_head;
  int64_t query_tiles_per_head;
  int64_t num_key_blocks;
  int64_t num_query_blocks;
  int64_t num_dq_sums;      // float32 elements
  int64_t num_dq_counters;  // int32 elements, of deterministic sums
  int num_threads;
  int smem_bytes;
};

BackwardPlan make_backward_plan(const Problem& problem, int smem_limit);

// The plan as JSON, for flash_attn.explain and messages.
std::ostream& operator<<(std::ostream& json, const BackwardPlan& plan);
std::string describe(const BackwardPlan& plan);

}  // namespace flash_attn
