// The main loop: O over the keys that a tile of rows sees, be they the queries of one head or of several.
#pragma once

#include "kernels/common/kv_range.h"
#include "kernels/common/mask.h"
#include "kernels/common/online_softmax.h"
#include "kernels/common/params.h"
#include "kernels/common/row_map.h"
#include "kernels/common/row_reducer.h"
#include "kernels/common/score.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/dropout.h"
#include "kernels/sm80/forward_traits.h"
#include "kernels/sm80/gemm.h"
#include "kernels/sm80/kv_pipeline.h"
#include "kernels/sm80/probabilities.h"

namespace flash_attn::sm80 {

using namespace cute;

// The rows and keys of one main loop.
template <class RowMap, class Keys, class QLoader>
struct ForwardTile {
  const SeqInfo& seq;
  RowMap rows;
  int m_begin;  // first row, counted from the entry's
  Keys keys;    // that each row sees
  KvRange range;
  int kv_head_idx;
  QLoader load_q;
};

// Accumulates O over the tiles of keys, the last first.
template <class Traits, class Tile, class Softmax, class Reducer, class AccO>
__device__ void forward_mainloop(const ForwardParams& params, const Tile& tile, typename Traits::SharedStorage& smem,
                                 Softmax& softmax, const Reducer& reducer, AccO& tOrO) {
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  const SeqInfo& seq = tile.seq;
  const KvRange& range = tile.range;
  if (range.is_empty()) return;

  using Mma = typename Traits::Mma;
  const auto q = operand_a<Mma, Along::kRows, typename Traits::TileQ>(smem.q_or_o);
  const auto k = operand_b<Mma, Along::kRows, typename Traits::TileK>(smem.k);
  const auto v = operand_b<Mma, Along::kCols, typename Traits::TileV>(smem.v);
  const auto coords = Traits::score_coords();
  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));

  KvPipeline<Traits> kv(KvTiles<Traits>(params, seq, tile.kv_head_idx, range, smem));
  tile.load_q.load(tile.m_begin, smem.q_or_o);
  kv.start(range.end - 1);

  for (int n = range.end - 1; n >= range.begin; --n) {
    kv.wait_for_k(n);
    Tensor tSrS = Mma::template make_accumulator<kTileM, kTileN>();  // (MMA, MMA_M, MMA_N)
    clear(tSrS);
    gemm<Mma>(tSrS, q, k);

    Tensor scores = make_tensor(tSrS.data(), as_rows_and_columns(tSrS.layout()));
    apply_score<Traits::kScore>(scores, coords, params.score, seq, tile.rows, tile.m_begin, n * kTileN);
    if (range.needs_mask(n)) apply_mask(scores, Traits::mask_coords(), tile.keys, tile.m_begin, n * kTileN);
    softmax.update(scores, output, reducer);
    kv.after_row_max(n);
    if constexpr (Traits::kScore == Score::kGeneral && !Traits::kFewRows) {
      if (params.dropout.rng_state != nullptr) {
        DropoutMask(params.dropout, params.heads.num_heads, seq.batch_idx, tile.rows.head_idx)
            .template apply<dropout_pairs(Traits::kWarpsN)>(scores, coords, tile.m_begin, n * kTileN);
      }
    }
    const auto p = as_probability_operand<Traits>(smem, tSrS);

    kv.wait_for_v(n);
    gemm<Mma>(tOrO, p, v);
    kv.after_product(n);
  }
  __syncthreads();  // O leaves through the shared memory of Q
}

// How this kernel's lanes make one value per row.
template <class Traits>
__device__ auto make_row_reducer(typename Traits::SharedStorage& smem) {
  if constexpr (Traits::kWarpsN > 1) {
    const auto coords = Traits::score_coords();
    return CrossWarpReducer<Traits::kWarpsN, Traits::kTileM, decltype(coords)>(
        smem.reduction, Traits::Mma::warp_n(threadIdx.x), coords);
  } else {
    return QuadReducer{};
  }
}

}  // namespace flash_attn::sm80
