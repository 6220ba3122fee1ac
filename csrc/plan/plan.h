// Problem -> Plan: which kernel runs, on which tiles, over which grid. Pure functions, without torch or CUDA calls.
#pragma once

#include <cstdint>
#include <ostream>
#include <stdexcept>
#include <string>

#include "plan/problem.h"
#include "variant/tiles.h"

namespace flash_attn {

struct Plan {
  Variant variant;
  Tile tile;
  // Query tiles of one head. Variable lengths are not known to the host, so this bounds their number (varlen_tiles.h).
  int64_t tiles_per_head;
  int64_t num_blocks;
  int num_splits;
  int num_threads;
  int smem_bytes;
};

// The call is valid, but no variant serves it.
struct UnsupportedProblem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// `smem_limit`: bytes of shared memory that a thread block of the GPU can have.
Plan make_plan(const Problem& problem, Arch arch, int smem_limit);

// The plan as JSON, for flash_attn.explain and messages.
std::ostream& operator<<(std::ostream& json, const Plan& plan);
std::string describe(const Plan& plan);

}  // namespace flash_attn
