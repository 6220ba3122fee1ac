// O over the keys that a tile of rows sees, whatever its rows are.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/dropout.h"
#include "kernels/common/fragment_layout.h"
#include "kernels/common/kv_range.h"
#include "kernels/common/mask.h"
#include "kernels/common/online_softmax.h"
#include "kernels/common/params.h"
#include "kernels/common/row_map.h"
#include "kernels/common/row_reducer.h"
#include "kernels/common/score.h"
#include "kernels/sm80/forward_traits.h"
#include "kernels/sm80/gemm.h"
#include "kernels/sm80/kv_pipeline.h"
#include "kernels/sm80/probabilities.h"

namespace flash_attn::sm80 {

using namespace cute;

// What the main loop is told about its rows and keys.
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

  Tensor sQ = make_tensor(make_smem_ptr(smem.q_or_o), typename Traits::SmemLayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(smem.k), typename Traits::SmemLayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(smem.v), typename Traits::SmemLayoutVt{});

  typename Traits::TiledMma mma;
  const auto thread_mma = mma.get_slice(threadIdx.x);
  Tensor tSrQ = thread_mma.partition_fragment_A(sQ);   // (MMA, MMA_M, MMA_K)
  Tensor tSrK = thread_mma.partition_fragment_B(sK);   // (MMA, MMA_N, MMA_K)
  Tensor tOrV = thread_mma.partition_fragment_B(sVt);  // (MMA, MMA_K over head_dim_v, MMA_N)
  const auto copy_q = make_tiled_copy_A(typename Traits::SmemCopyAtom{}, mma);
  const auto copy_k = make_tiled_copy_B(typename Traits::SmemCopyAtom{}, mma);
  const auto copy_v = make_tiled_copy_B(typename Traits::SmemCopyAtomTransposed{}, mma);
  const Tensor tSsQ = copy_q.get_slice(threadIdx.x).partition_S(sQ);
  const Tensor tSsK = copy_k.get_slice(threadIdx.x).partition_S(sK);
  const Tensor tOsV = copy_v.get_slice(threadIdx.x).partition_S(sVt);
  const auto coords = Traits::score_coords();
  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));

  KvPipeline<Traits> kv(params, seq, tile.kv_head_idx, range, smem);
  tile.load_q.load(tile.m_begin, sQ);
  kv.start(range.end - 1);

  for (int n = range.end - 1; n >= range.begin; --n) {
    kv.wait_for_k(n);
    Tensor tSrS = partition_fragment_C(mma, Shape<Int<kTileM>, Int<kTileN>>{});  // (MMA, MMA_M, MMA_N)
    clear(tSrS);
    gemm_smem_smem(mma, tSrS, tSrQ, tSrK, tSsQ, tSsK, copy_q, copy_k);

    Tensor scores = make_tensor(tSrS.data(), as_rows_and_columns(tSrS.layout()));
    apply_score<Traits::kScore>(scores, coords, params.score, seq, tile.rows, tile.m_begin, n * kTileN);
    if (range.needs_mask(n)) apply_mask(scores, Traits::mask_coords(), tile.keys, tile.m_begin, n * kTileN);
    softmax.update(scores, output, reducer);
    kv.on_maxima(n);
    if constexpr (Traits::kScore == Score::kGeneral && !Traits::kFewRows) {
      if (params.dropout.rng_state != nullptr) {
        DropoutMask(params.dropout, params.heads.num_heads, seq.batch_idx, tile.rows.head_idx)
            .template apply<(Traits::kWarpsN > 1 ? 1 : 4)>(scores, coords, tile.m_begin, n * kTileN);
      }
    }
    auto probabilities = Probabilities<Traits>::put(smem, tSrS);

    kv.wait_for_v(n);
    Probabilities<Traits>::multiply(tOrO, probabilities, tOrV, tOsV, copy_v);
    kv.on_product(n);
  }
  __syncthreads();  // O leaves through the shared memory of Q
}

// How this kernel's lanes make one value per row.
template <class Traits>
__device__ auto make_row_reducer(typename Traits::SharedStorage& smem) {
  if constexpr (Traits::kWarpsN > 1) {
    const auto coords = Traits::score_coords();
    const int warp_idx = threadIdx.x / kThreadsPerWarp;
    return CrossWarpReducer<Traits::kWarpsN, Traits::kTileM, decltype(coords)>(smem.rows, warp_idx / Traits::kWarpsM,
                                                                               coords);
  } else {
    return QuadReducer{};
  }
}

}  // namespace flash_attn::sm80
