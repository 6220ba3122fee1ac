// Which calls the SM90 kernels leave to those of SM80, which run on the same GPUs, and which heads share their tiles.
#pragma once

#include "plan/plan.h"

namespace flash_attn {

// How many query heads of a key-value head share a tile of rows, or those of a cluster: one, all, or as many of them as
// a tile can take.
int packed_heads_on_sm90(const Problem& problem, const Tile& tile);

// Whether SM80's kernels serve the call better: by tiles for few rows, where most rows of SM90's would be empty, or by
// splitting keys, where SM90's tiles would leave most of the GPU idle.
bool sm80_beats_sm90(const Problem& problem, const Tile& tile, const Gpu& gpu);

}  // namespace flash_attn
