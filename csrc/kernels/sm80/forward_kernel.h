// The SM80 forward kernel: one thread block computes one tile of query rows of one head.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/instructions.h"
#include "kernels/common/params.h"
#include "kernels/common/row_results.h"
#include "kernels/common/seq_info.h"
#include "kernels/sm80/forward_mainloop.h"
#include "kernels/sm80/forward_traits.h"
#include "kernels/sm80/tile_loader.h"
#include "kernels/sm80/tile_store.h"

namespace flash_attn::sm80 {

using namespace cute;

template <class Traits, class Softmax, class Reducer, class AccO>
__device__ void attend_to_keys(const ForwardParams& params, const TileCoord& tile, typename Traits::SharedStorage& smem,
                               Softmax& softmax, const Reducer& reducer, AccO& tOrO) {
  using Element = typename Traits::Element;
  using QLoader = TileLoader<Traits, Traits::kTileM, Traits::kHeadDim>;
  using Keys = VisibleKeys<Traits::kMask>;
  const SeqInfo& seq = tile.seq;
  const Keys keys{seq, params.window};
  const QLoader load_q(head_of<Element>(params.q, seq.batch_idx, seq.row_begin_q, tile.head_idx), params.q.row_stride,
                       seq.seqlen_q, params.heads.head_dim);
  const ForwardTile<HeadRows, Keys, QLoader> rows{
      .seq = seq,
      .rows = {tile.head_idx},
      .m_begin = tile.m_begin,
      .keys = keys,
      .range = kv_range<Traits::kMask, Traits::kTileM, Traits::kTileN>(keys, tile.m_begin),
      .kv_head_idx = tile.head_idx / params.heads.num_heads_per_kv,
      .load_q = load_q};
  forward_mainloop<Traits>(params, rows, smem, softmax, reducer, tOrO);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads) forward_kernel(const __grid_constant__ ForwardParams params) {
  auto& smem = dynamic_smem<typename Traits::SharedStorage>();

  const TileCoord tile =
      locate_tile<Traits::kTileM>(params.seq, params.heads.num_heads, params.tiles_per_head, blockIdx.x);
  if (!tile.has_rows()) return;

  typename Traits::TiledMma mma;
  Tensor tOrO = partition_fragment_C(mma, Shape<Int<Traits::kTileM>, Int<Traits::kHeadDimV>>{});
  clear(tOrO);
  OnlineSoftmax<Traits::kRowsPerLane> softmax(params.score.softmax_scale);
  const auto reducer = make_row_reducer<Traits>(smem);
  if (tile.has_used_rows()) attend_to_keys<Traits>(params, tile, smem, softmax, reducer, tOrO);

  const float sink = params.sink.scores == nullptr ? -INFINITY : params.sink.scores[tile.head_idx];
  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));
  auto lse = softmax.finish(output, reducer, sink, params.dropout.rescale);
  const SeqInfo& seq = tile.seq;
  const auto coords = Traits::output_coords();
  clear_unused_rows<Traits::kTileM>(tile.m_begin, seq.seqlen_q, coords, output, lse);
  store_lse(params, tile, coords, lse);
  store_tile<Traits, typename Traits::TiledMma, Traits::kTileM, Traits::kHeadDimV>(
      params.o, {seq.batch_idx, seq.row_begin_q, tile.m_begin, seq.rows_q}, tile.head_idx, {0, params.heads.head_dim_v},
      smem.q_or_o, tOrO);
}

}  // namespace flash_attn::sm80
