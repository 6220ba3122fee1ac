// The SM80 forward kernel: one thread block computes one tile of query rows of one head, or a part of its keys.
#pragma once

#include "kernels/common/instructions.h"
#include "kernels/common/params.h"
#include "kernels/common/row_address.h"
#include "kernels/common/row_results.h"
#include "kernels/common/seq_info.h"
#include "kernels/common/split_store.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/forward_mainloop.h"
#include "kernels/sm80/forward_traits.h"
#include "kernels/sm80/tile_loader.h"
#include "kernels/sm80/tile_store.h"

namespace flash_attn::sm80 {

using namespace cute;

// Kernels with the general mask may split the keys of every tile into the same number of parts; the parts of a tile are
// a whole grid of tiles apart. The part's index is computed anew where it is needed, which saves a register in the main
// loop.
template <class Traits>
__device__ int num_splits_of(const ForwardParams& params) {
  return Traits::kMask == Mask::kGeneral ? params.split.num_splits : 1;
}

template <class Traits>
__device__ int part_idx_of(const ForwardParams& params) {
  return blockIdx.x / (gridDim.x / num_splits_of<Traits>(params));
}

template <class Traits>
__device__ TileCoord locate_tile_or_part(const ForwardParams& params) {
  int tile_idx = blockIdx.x;
  if (num_splits_of<Traits>(params) > 1) tile_idx %= gridDim.x / num_splits_of<Traits>(params);
  return locate_tile<Traits::kTileM>(params.seq, params.heads.num_heads, params.tiles_per_head, tile_idx);
}

// Stores one of several parts in the workspace of SplitParams.
template <class Traits, class Softmax, class Reducer, class AccO>
__device__ void store_part(const ForwardParams& params, const TileCoord& tile, Softmax& softmax, const Reducer& reducer,
                           AccO& output) {
  const SeqInfo& seq = tile.seq;
  const auto coords = Traits::output_coords();
  const int part_idx = part_idx_of<Traits>(params);
  const int num_splits = num_splits_of<Traits>(params);
  const EntrySlots slots = slots_of_entry<Traits::kTileM>(params, seq, 1, num_splits);
  const int64_t slot = slots.slot_of<Traits::kTileM>(tile.m_begin, part_idx);
  if (tile.head_idx == 0 && threadIdx.x == 0 && slot == slots.first) {
    note_parts(params, seq.batch_idx, slots.first, num_splits);
  }
  // The sinks join when the parts meet.
  auto lse = softmax.finish(output, reducer, -INFINITY, 1.f);
  clear_unused_rows<Traits::kTileM>(tile.m_begin, seq.seqlen_q, coords, output, lse);
  store_partial<Traits::kTileM>(params, slot * params.heads.num_heads + tile.head_idx, seq.rows_q - tile.m_begin,
                                coords, 0, output, lse);
}

template <class Traits, class Softmax, class Reducer, class AccO>
__device__ void attend_to_keys(const ForwardParams& params, const TileCoord& tile, typename Traits::SharedStorage& smem,
                               Softmax& softmax, const Reducer& reducer, AccO& tOrO) {
  using Element = typename Traits::Element;
  using QLoader = TileLoader<Traits, Traits::kTileM, Traits::kHeadDim>;
  using Keys = VisibleKeys<Traits::kMask>;
  const SeqInfo& seq = tile.seq;
  const Keys keys{seq, params.window};
  KvRange range = kv_range<Traits::kMask, Traits::kTileM, Traits::kTileN>(keys, tile.m_begin);
  if (const int num_splits = num_splits_of<Traits>(params); num_splits > 1) {
    range = range.part(part_idx_of<Traits>(params), num_splits);
  }
  const QLoader load_q(row_of<Element>(params.q, seq.batch_idx, seq.row_begin_q, tile.head_idx), params.q.row_stride,
                       seq.seqlen_q, params.heads.head_dim);
  const ForwardTile<HeadRows, Keys, QLoader> forward_tile{.seq = seq,
                                                          .rows = {tile.head_idx},
                                                          .m_begin = tile.m_begin,
                                                          .keys = keys,
                                                          .range = range,
                                                          .kv_head_idx = tile.head_idx / params.heads.num_heads_per_kv,
                                                          .load_q = load_q};
  forward_mainloop<Traits>(params, forward_tile, smem, softmax, reducer, tOrO);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads) forward_kernel(const __grid_constant__ ForwardParams params) {
  auto& smem = dynamic_smem<typename Traits::SharedStorage>();

  const TileCoord tile = locate_tile_or_part<Traits>(params);
  if (!tile.has_rows()) return;

  Tensor tOrO = Traits::Mma::template make_accumulator<Traits::kTileM, Traits::kHeadDimV>();
  clear(tOrO);
  OnlineSoftmax<Traits::kRowsPerLane> softmax(params.score.softmax_scale);
  const auto reducer = make_row_reducer<Traits>(smem);
  if (tile.has_used_rows()) attend_to_keys<Traits>(params, tile, smem, softmax, reducer, tOrO);

  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));
  const SeqInfo& seq = tile.seq;
  if (num_splits_of<Traits>(params) > 1) {
    if (seq.batch_idx < params.seq.batch) {
      store_part<Traits>(params, tile, softmax, reducer, output);
      return;
    }
    if (part_idx_of<Traits>(params) > 0) return;  // rows of no entry are not merged
  }
  const auto coords = Traits::output_coords();
  const float sink = params.sink.scores == nullptr ? -INFINITY : params.sink.scores[tile.head_idx];
  auto lse = softmax.finish(output, reducer, sink, params.dropout.rescale);
  clear_unused_rows<Traits::kTileM>(tile.m_begin, seq.seqlen_q, coords, output, lse);
  store_lse(params, tile, coords, lse);
  store_tile<Traits, typename Traits::Mma, Traits::kTileM, Traits::kHeadDimV>(
      params.o, {seq.batch_idx, seq.row_begin_q, tile.m_begin, seq.rows_q}, tile.head_idx, {0, params.heads.head_dim_v},
      smem.q_or_o, tOrO);
}

}  // namespace flash_attn::sm80
