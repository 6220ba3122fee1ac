// The consumers' side of announcements: the tiles, as the producer finds them one after another.
#pragma once

#include "kernels/sm90/barriers.h"
#include "kernels/sm90/tile_id.h"
#include "kernels/sm90/visited_keys.h"

namespace flash_attn::sm90 {

// What depends on the result stays in uniform registers. All lanes of the warp have read `id` when it returns, so that
// one of them may release it.
__device__ inline TileId read_by_warp(const TileId& id) {
  const TileId read = id;
  __syncwarp();
  return {__shfl_sync(~0u, read.entry, 0), __shfl_sync(~0u, read.first_head, 0), __shfl_sync(~0u, read.m_begin, 0),
          __shfl_sync(~0u, read.part, 0)};
}

// Calls `work(tile, id)` for each tile that the producer announces. `id` stays in shared memory, from where what is
// needed at the tile's end can be read again: kept, it would cost the loop registers.
template <class Traits, class Work>
__device__ void for_each_announced_tile(const ForwardParams& params, typename Traits::SharedStorage& smem,
                                        const Work& work) {
  StageCursor<Traits::kTileIdStages> cursor;
  for (;;) {
    wait_full(smem.barriers.tile_ids, cursor);
    const TileId& announced = smem.barriers.tile_id[cursor.idx];
    const TileId id = read_by_warp(announced);
    if (!id.exists()) break;
    work(without_unseen_keys<Traits>(params, packed_tile_of(params, id)), announced);
    __syncwarp();
    release(smem.barriers.tile_ids, cursor);
  }
}

}  // namespace flash_attn::sm90
