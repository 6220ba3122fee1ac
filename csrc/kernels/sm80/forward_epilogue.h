// Stores a tile of O, through shared memory so that rows leave in 16-byte pieces, and its log-sum-exp.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/fragment_layout.h"
#include "kernels/common/params.h"
#include "kernels/common/seq_info.h"
#include "kernels/sm80/forward_traits.h"
#include "kernels/sm80/tile_loader.h"

namespace flash_attn::sm80 {

using namespace cute;

// The (row, column) within the tile of each element that this lane holds of an accumulator with kCols columns.
template <class Traits, int kCols>
__device__ auto accumulator_coords() {
  const auto thread_mma = typename Traits::TiledMma{}.get_slice(threadIdx.x);
  const Tensor coords = thread_mma.partition_C(make_identity_tensor(Shape<Int<Traits::kTileM>, Int<kCols>>{}));
  return make_tensor(coords.data(), as_rows_and_columns(coords.layout()));
}

// Rows past the length in use, but within the tensor: O = 0, LSE = -inf, with or without a sink.
template <class Traits, class Output, class LseRows>
__device__ void clear_unused_rows(int m_begin, int num_used_rows, Output& output, LseRows& lse) {
  if (m_begin + Traits::kTileM <= num_used_rows) return;
  const auto coords = accumulator_coords<Traits, Traits::kHeadDimV>();
  CUTE_UNROLL
  for (int row = 0; row < size<0>(output); ++row) {
    if (m_begin + static_cast<int>(get<0>(coords(row, 0))) < num_used_rows) continue;
    lse(row) = -INFINITY;
    CUTE_UNROLL
    for (int col = 0; col < size<1>(output); ++col) output(row, col) = 0.f;
  }
}

template <class Traits, class LseRows>
__device__ void store_lse(const ForwardParams& params, const TileCoord& tile, const LseRows& lse) {
  const SeqInfo& seq = tile.seq;
  float* target = params.lse.ptr + seq.batch_idx * params.lse.batch_stride + seq.row_begin_q +
                  tile.head_idx * params.lse.head_stride + tile.m_begin;
  const auto coords = accumulator_coords<Traits, Traits::kHeadDimV>();
  if (static_cast<int>(get<1>(coords(0, 0))) != 0) return;  // the first lane of four that share a row writes it
  CUTE_UNROLL
  for (int i = 0; i < size(lse); ++i) {
    const int row = get<0>(coords(i, 0));
    if (tile.m_begin + row < seq.rows_q) target[row] = lse(i);
  }
}

// O as it leaves, in the shared memory of Q.
template <class Traits, class AccO>
__device__ auto round_to_smem(typename Traits::SharedStorage& smem, const AccO& tOrO) {
  using Element = typename Traits::Element;
  Tensor sO = make_tensor(make_smem_ptr(smem.q_or_o), typename Traits::SmemLayoutO{});
  const auto to_smem =
      make_tiled_copy_C(Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<32>, Element>{}, typename Traits::TiledMma{});
  const auto thread_to_smem = to_smem.get_slice(threadIdx.x);
  Tensor rounded = convert_to<Element>(tOrO);
  copy(to_smem, thread_to_smem.retile_S(rounded), thread_to_smem.partition_D(sO));
  __syncthreads();
  return sO;
}

template <class Traits, class AccO>
__device__ void store_output(const ForwardParams& params, const TileCoord& tile, typename Traits::SharedStorage& smem,
                             const AccO& tOrO) {
  using Element = typename Traits::Element;
  using TiledStore = typename Traits::template Access<Traits::kHeadDimV>::TiledStore;
  const SeqInfo& seq = tile.seq;
  const Tensor sO = round_to_smem<Traits>(smem, tOrO);

  const auto thread_store = TiledStore{}.get_slice(threadIdx.x);
  Element* head = static_cast<Element*>(params.o.ptr) + seq.batch_idx * params.o.batch_stride +
                  seq.row_begin_q * params.o.row_stride + tile.head_idx * params.o.head_stride;
  const Tensor source = thread_store.partition_S(sO);  // (CPY, CPY_M, CPY_K)
  Tensor target =
      thread_store.partition_D(gmem_tile<Traits::kTileM, Traits::kHeadDimV>(head, tile.m_begin, params.o.row_stride));
  const Tensor coords =
      thread_store.partition_D(make_identity_tensor(Shape<Int<Traits::kTileM>, Int<Traits::kHeadDimV>>{}));
  CUTE_UNROLL
  for (int m = 0; m < size<1>(source); ++m) {
    if (tile.m_begin + static_cast<int>(get<0>(coords(0, m, 0))) >= seq.rows_q) continue;
    CUTE_UNROLL
    for (int k = 0; k < size<2>(source); ++k) {
      if (static_cast<int>(get<1>(coords(0, m, k))) < params.heads.head_dim_v) {
        copy(TiledStore{}, source(_, m, k), target(_, m, k));
      }
    }
  }
}

}  // namespace flash_attn::sm80
