// Which calls the SM90 kernels leave to those of SM80, which run on the same GPUs, and which heads share their tiles.
#pragma once

#include "plan/plan.h"

namespace flash_attn {

// How many query heads of a key-value head share a tile of rows, or those of a cluster: all or one.
int packed_heads_on_sm90(const Problem& problem, const Tile& tile);

// Whether SM80's tiles for few rows serve the call better than SM90's, most of whose rows would be empty, or whose keys
// would have to be split to occupy the GPU.
bool few_rows_beat_sm90(const Problem& problem, const Tile& tile, const Gpu& gpu);

}  // namespace flash_attn
