// The thread blocks that bring each other tiles of K and V: one, which has nobody to wait for, or two of a cluster.
#pragma once

#include <type_traits>

#include "kernels/sm90/instructions.h"
#include "variant/tiles.h"

namespace flash_attn::sm90 {

struct SingleBlock {
  static constexpr int kNumBlocks = 1;

  static __device__ int block_idx() { return 0; }
  static __device__ void sync() { __syncthreads(); }
  static __device__ void sync_before_leaving() {}

  // A warp's arrival at a barrier of every block.
  static __device__ void arrive(Mbarrier& barrier) {
    if (threadIdx.x % kThreadsPerWarp == 0) barrier.arrive();
  }
  // A box to its place in every block, whose barriers there count the bytes.
  static __device__ void load(const CUtensorMap& map, CacheHint hint, Mbarrier& barrier, void* smem,
                              const BoxCoord& coord) {
    load_box(map, hint, barrier, smem, coord);
  }
};

struct BlockPair {
  static constexpr int kNumBlocks = 2;

  static __device__ int block_idx() { return block_of_cluster(); }
  static __device__ void sync() { sync_cluster(); }
  // A block's shared memory must be there for as long as the other one may arrive at its barriers.
  static __device__ void sync_before_leaving() { sync_cluster(); }

  static __device__ void arrive(Mbarrier& barrier) {
    const int lane = threadIdx.x % kThreadsPerWarp;
    if (lane < kNumBlocks) barrier.arrive_in_block(lane);
  }
  static __device__ void load(const CUtensorMap& map, CacheHint hint, Mbarrier& barrier, void* smem,
                              const BoxCoord& coord) {
    constexpr unsigned kAllBlocks = (1u << kNumBlocks) - 1;
    load_box_to_blocks(map, hint, barrier, smem, kAllBlocks, coord);
  }
};

// As the tile's row says.
template <int kNumBlocks>
using ClusterOf = std::conditional_t<kNumBlocks == 1, SingleBlock, BlockPair>;

}  // namespace flash_attn::sm90
