// The SM80 forward kernel for few queries: one thread block computes one tile of packed rows over a part of its keys.
#pragma once

#include "kernels/common/instructions.h"
#include "kernels/common/params.h"
#include "kernels/common/row_results.h"
#include "kernels/common/split_store.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/few_rows_schedule.h"
#include "kernels/sm80/forward_mainloop.h"
#include "kernels/sm80/forward_traits.h"
#include "kernels/sm80/packed_rows.h"
#include "kernels/sm80/tile_loader.h"

namespace flash_attn::sm80 {

using namespace cute;

template <class Traits, class Softmax, class Reducer, class AccO>
__device__ void attend_to_keys(const ForwardParams& params, const FewRowsTile& tile,
                               typename Traits::SharedStorage& smem, Softmax& softmax, const Reducer& reducer,
                               AccO& tOrO) {
  static_assert(Traits::kMask == Mask::kGeneral, "packed rows are compiled with the general mask only");
  using Rows = PackedRowAddresses<typename Traits::Element>;
  using QLoader = ScatteredTileLoader<Traits, Traits::kTileM, Traits::kHeadDim, Rows>;
  using Keys = PackedKeys<Traits::kMask>;
  const Keys keys{{tile.seq, params.window}, tile.rows};
  const int num_rows = tile.num_used_rows();
  const ForwardTile<PackedRows, Keys, QLoader> forward_tile{
      .seq = tile.seq,
      .rows = tile.rows,
      .m_begin = tile.m_begin,
      .keys = keys,
      .range = kv_range_of_rows<Traits::kTileM, Traits::kTileN>(keys, tile.m_begin, num_rows)
                   .part(tile.split_idx, tile.num_splits),
      .kv_head_idx = tile.rows.first_head / params.heads.num_heads_per_kv,
      .load_q = QLoader(Rows(params.q, tile.seq, tile.rows), num_rows, params.heads.head_dim)};
  forward_mainloop<Traits>(params, forward_tile, smem, softmax, reducer, tOrO);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads) few_rows_kernel(const __grid_constant__ ForwardParams params) {
  auto& smem = dynamic_smem<typename Traits::SharedStorage>();

  const FewRowsTile tile = locate_few_rows_tile<Traits::kTileM, Traits::kTileN>(params, blockIdx.x);
  if (tile.opens_entry() && threadIdx.x == 0 && params.split.entries != nullptr &&
      tile.seq.batch_idx < params.seq.batch) {
    note_parts(params, tile.seq.batch_idx, tile.first_slot, tile.num_splits);
  }
  if (!tile.has_part()) return;

  Tensor tOrO = Traits::Mma::template make_accumulator<Traits::kTileM, Traits::kHeadDimV>();
  clear(tOrO);
  using Softmax = OnlineSoftmax<Traits::kRowsPerLane>;
  Softmax softmax(params.score.softmax_scale);
  const auto reducer = make_row_reducer<Traits>(smem);
  if (tile.has_used_rows()) attend_to_keys<Traits>(params, tile, smem, softmax, reducer, tOrO);

  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));
  const auto coords = Traits::output_coords();
  if (tile.num_splits > 1) {
    // The sinks join when the parts meet.
    auto lse = softmax.finish(output, reducer, -INFINITY, 1.f);
    clear_unused_rows<Traits::kTileM>(tile.m_begin, tile.num_used_rows(), coords, output, lse);
    store_partial<Traits::kTileM>(params, blockIdx.x, tile.num_rows() - tile.m_begin, coords, 0, output, lse);
    return;
  }
  auto lse = softmax.finish(output, reducer, sinks_of_rows<Softmax>(params.sink.scores, tile, coords), 1.f);
  clear_unused_rows<Traits::kTileM>(tile.m_begin, tile.num_used_rows(), coords, output, lse);
  store_packed_lse(params, tile, coords, lse);
  store_packed_output<Traits>(params, tile, smem, tOrO);
}

}  // namespace flash_attn::sm80
