// Which calls the SM90 kernels leave to those of SM80, which run on the same GPUs, and which heads share their tiles.
#pragma once

#include "plan/plan.h"

namespace flash_attn {

// The heads that share tiles, and in how many parts the keys of all tiles are.
SplitPlan split_plan_on_sm90(const Problem& problem, const Tile& tile, const Gpu& gpu);

// Whether SM80's tiles for few rows serve the call better than SM90's, most of whose rows would be empty, or which
// would leave part of the GPU idle even with their keys split.
bool sm80_beats_sm90(const Problem& problem, const Tile& tile, const Gpu& gpu);

}  // namespace flash_attn
