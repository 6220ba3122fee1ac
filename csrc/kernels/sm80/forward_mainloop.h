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
#include "kernels/sm80/probabilities.h"
#include "kernels/sm80/tile_loader.h"

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

// Accumulates O over the tiles of keys, the last first. K and V have one stage each: V(n) arrives while S = Q K(n)' is
// computed, K(n - 1) while O += P V(n) is. Where few rows leave the time to memory, K(n - 1) sets out as soon as the
// warps have met over the maxima of S.
template <class Traits, class Tile, class Softmax, class Reducer, class AccO>
__device__ void forward_mainloop(const ForwardParams& params, const Tile& tile, typename Traits::SharedStorage& smem,
                                 Softmax& softmax, const Reducer& reducer, AccO& tOrO) {
  using Element = typename Traits::Element;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  constexpr bool kKeysEarly = Traits::kFewRows && Traits::kWarpsN > 1;
  const SeqInfo& seq = tile.seq;
  const KvRange& range = tile.range;
  if (range.is_empty()) return;

  Tensor sQ = make_tensor(make_smem_ptr(smem.q_or_o), typename Traits::SmemLayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(smem.k), typename Traits::SmemLayoutK{});
  Tensor sV = make_tensor(make_smem_ptr(smem.v), typename Traits::SmemLayoutV{});
  Tensor sVt = make_tensor(make_smem_ptr(smem.v), typename Traits::SmemLayoutVt{});

  const KvTileLoader<Traits, Traits::kHeadDim> load_k(KvRows<Element>(params.k, params.page, seq, tile.kv_head_idx),
                                                      seq.seqlen_k, params.heads.head_dim);
  const KvTileLoader<Traits, Traits::kHeadDimV> load_v(KvRows<Element>(params.v, params.page, seq, tile.kv_head_idx),
                                                       seq.seqlen_k, params.heads.head_dim_v);

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
  const auto load_next_k = [&](int n) {
    if (n > range.begin) load_k.load((n - 1) * kTileN, sK);
    cp_async_fence();
  };

  tile.load_q.load(tile.m_begin, sQ);
  load_k.load((range.end - 1) * kTileN, sK);
  cp_async_fence();

  for (int n = range.end - 1; n >= range.begin; --n) {
    cp_async_wait<0>();
    __syncthreads();  // K(n) has landed, and every warp is done with V(n + 1)
    load_v.load(n * kTileN, sV);
    cp_async_fence();

    Tensor tSrS = partition_fragment_C(mma, Shape<Int<kTileM>, Int<kTileN>>{});  // (MMA, MMA_M, MMA_N)
    clear(tSrS);
    gemm_smem_smem(mma, tSrS, tSrQ, tSrK, tSsQ, tSsK, copy_q, copy_k);

    Tensor scores = make_tensor(tSrS.data(), as_rows_and_columns(tSrS.layout()));
    apply_score<Traits::kScore>(scores, coords, params.score, seq, tile.rows, tile.m_begin, n * kTileN);
    if (range.needs_mask(n)) apply_mask(scores, coords, tile.keys, tile.m_begin, n * kTileN);
    softmax.update(scores, output, reducer);
    if constexpr (kKeysEarly) load_next_k(n);  // the reducer's barrier: every warp is done with K(n)
    if constexpr (Traits::kScore == Score::kGeneral && !Traits::kFewRows) {
      if (params.dropout.rng_state != nullptr) {
        DropoutMask(params.dropout, params.heads.num_heads, seq.batch_idx, tile.rows.head_idx)
            .template apply<(Traits::kWarpsN > 1 ? 1 : 4)>(scores, coords, tile.m_begin, n * kTileN);
      }
    }
    auto probabilities = Probabilities<Traits>::put(smem, tSrS);

    cp_async_wait<(kKeysEarly ? 1 : 0)>();
    __syncthreads();  // V(n) and the warps' shares of P are there, and every warp is done with K(n)
    if constexpr (!kKeysEarly) load_next_k(n);

    Probabilities<Traits>::multiply(tOrO, probabilities, tOrV, tOsV, copy_v);
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
