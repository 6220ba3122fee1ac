// dQ is summed in float32 by the thread blocks of all tiles of keys, and rounded once at the end.
#pragma once

#include "kernels/common/backward_params.h"
#include "kernels/common/instructions.h"
#include "kernels/common/seq_info.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/backward_traits.h"
#include "kernels/sm80/tile_store.h"

namespace flash_attn::sm80 {

using namespace cute;

// Index of the sums of one tile of query rows; the host allocates them in the same order.
template <class Traits>
__device__ int64_t dq_tile_idx(const BackwardParams& params, const SeqInfo& seq, int head_idx, int m_idx) {
  int64_t run = head_idx;
  int64_t tile = m_idx;
  if (params.seq.cu_seqlens_q == nullptr) {
    run += static_cast<int64_t>(seq.batch_idx) * params.heads.num_heads;
  } else {
    tile += first_varlen_slot(seq.row_begin_q, seq.batch_idx, Traits::kTileM);
  }
  return run * params.dq_sums.tiles_per_head + tile;
}

// This lane's first sum of a tile's columns; the others follow at a stride of the thread block's size.
template <class Traits>
__device__ float* dq_sums_of(const BackwardParams& params, int64_t tile_idx, int column_block) {
  constexpr int kTileElements = Traits::kTileM * Traits::kColumns;
  return params.dq_sums.ptr + (tile_idx * Traits::kColumnBlocks + column_block) * kTileElements + threadIdx.x;
}

// Adds in any order.
template <class Traits, class Acc>
__device__ void add_to_dq(float* sums, const Acc& acc) {
  CUTE_UNROLL
  for (int i = 0; i < size(acc); ++i) add_to_global(sums + i * Traits::kNumThreads, acc(i));
}

// Adds in the order of turns: `counter` is the turn that may add now.
template <class Traits, class Acc>
__device__ void add_to_dq_in_turn(float* sums, const Acc& acc, int* counter, int turn, const int* are_lost) {
  if (threadIdx.x == 0) {
    while (load_acquire(counter) != turn && *are_lost == 0) pause();
  }
  __syncthreads();
  add_to_dq<Traits>(sums, acc);
  // What the barrier lets this thread see, its store_release lets the next block see.
  __syncthreads();
  if (threadIdx.x == 0) store_release(counter, turn + 1);
}

// Scales, rounds and stores dQ, a tile of query rows per thread block.
template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads) store_dq_kernel(const __grid_constant__ BackwardParams params) {
  auto* smem = &dynamic_smem<typename Traits::Element>();

  const int column_block = blockIdx.x % Traits::kColumnBlocks;
  const TileCoord tile = locate_tile<Traits::kTileM>(params.seq, params.heads.num_heads, params.dq_sums.tiles_per_head,
                                                     blockIdx.x / Traits::kColumnBlocks);
  if (!tile.has_rows()) return;

  Tensor acc = Traits::MmaDq::template make_accumulator<Traits::kTileM, Traits::kColumns>();  // (MMA, MMA_M, MMA_N)
  const int64_t tile_idx = dq_tile_idx<Traits>(params, tile.seq, tile.head_idx, tile.m_begin / Traits::kTileM);
  const float* sums = dq_sums_of<Traits>(params, tile_idx, column_block);
  CUTE_UNROLL
  for (int i = 0; i < size(acc); ++i) acc(i) = sums[i * Traits::kNumThreads] * params.grad_scale;

  const RowBlock rows{tile.seq.batch_idx, tile.seq.row_begin_q, tile.m_begin, tile.seq.rows_q};
  const ColumnBlock columns{column_block * Traits::kColumns, params.heads.head_dim};
  store_tile<Traits, typename Traits::MmaDq, Traits::kTileM, Traits::kColumns>(params.dq, rows, tile.head_idx, columns,
                                                                               smem, acc);
}

}  // namespace flash_attn::sm80
