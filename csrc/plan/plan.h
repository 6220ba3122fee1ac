// Problem -> Plan: which kernel runs, on which tiles, over which grid. Pure functions, without torch or CUDA calls.
#pragma once

#include <cstdint>
#include <ostream>
#include <stdexcept>
#include <string>

#include "plan/problem.h"
#include "variant/tiles.h"

namespace flash_attn {

// What the planner knows of a GPU.
struct Gpu {
  int smem_limit;  // bytes of shared memory that a thread block can have
  int num_sms;
};

// How a kernel shares its work out (SplitParams). Kernels for many rows mostly have one split.
struct SplitPlan {
  int packed_heads = 1;
  int64_t num_slots = 0;
  int num_splits = 1;  // 0: by the lengths, which are on the device
  int target_slots = 0;
  int min_tiles = 0;

  bool needs_merge() const { return num_splits != 1; }
};

struct Plan {
  Variant variant;
  Tile tile;
  // Query tiles of one head, or of those that share tiles; with clusters, those of a cluster are one. Variable lengths
  // are not known to the host, so this bounds their number (varlen_tiles.h).
  int64_t tiles_per_head;
  int64_t num_blocks;
  int num_threads;
  int smem_bytes;
  SplitPlan split;
};

// The call is valid, but no variant serves it.
struct UnsupportedProblem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// SM80's kernels serve what SM90's, where they are preferred, lack or are worse at.
Plan make_plan(const Problem& problem, Arch preferred, const Gpu& gpu);

// The plan as JSON, for flash_attn.explain and messages.
std::ostream& operator<<(std::ostream& json, const Plan& plan);
std::string describe(const Plan& plan);

}  // namespace flash_attn
