// The SM80 forward kernel: one thread block computes one tile of query rows of one head.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/dropout.h"
#include "kernels/common/fragment_layout.h"
#include "kernels/common/instructions.h"
#include "kernels/common/kv_range.h"
#include "kernels/common/mask.h"
#include "kernels/common/online_softmax.h"
#include "kernels/common/params.h"
#include "kernels/common/row_reducer.h"
#include "kernels/common/score.h"
#include "kernels/common/seq_info.h"
#include "kernels/sm80/forward_epilogue.h"
#include "kernels/sm80/forward_traits.h"
#include "kernels/sm80/gemm.h"
#include "kernels/sm80/probabilities.h"
#include "kernels/sm80/tile_loader.h"

namespace flash_attn::sm80 {

using namespace cute;

// Accumulates O over the tiles of keys, the last first. K and V have one stage each: V(n) arrives while S = Q K(n)' is
// computed, K(n - 1) while O += P V(n) is.
template <class Traits, class Softmax, class Reducer, class AccO>
__device__ void forward_mainloop(const ForwardParams& params, const TileCoord& tile,
                                 typename Traits::SharedStorage& smem, Softmax& softmax, const Reducer& reducer,
                                 AccO& tOrO) {
  using Element = typename Traits::Element;
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  const SeqInfo& seq = tile.seq;
  const VisibleKeys<Traits::kMask> keys{seq, params.window};
  const KvRange range = kv_range<Traits::kMask, kTileM, kTileN>(keys, tile.m_begin);
  if (range.is_empty()) return;

  Tensor sQ = make_tensor(make_smem_ptr(smem.q_or_o), typename Traits::SmemLayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(smem.k), typename Traits::SmemLayoutK{});
  Tensor sV = make_tensor(make_smem_ptr(smem.v), typename Traits::SmemLayoutV{});
  Tensor sVt = make_tensor(make_smem_ptr(smem.v), typename Traits::SmemLayoutVt{});

  const int kv_head_idx = tile.head_idx / params.heads.num_heads_per_kv;
  const TileLoader<Traits, kTileM, Traits::kHeadDim> load_q(
      head_of<Element>(params.q, seq.batch_idx, seq.row_begin_q, tile.head_idx), params.q.row_stride, seq.seqlen_q,
      params.heads.head_dim);
  const KvTileLoader<Traits, Traits::kHeadDim> load_k(KvRows<Element>(params.k, params.page, seq, kv_head_idx),
                                                      seq.seqlen_k, params.heads.head_dim);
  const KvTileLoader<Traits, Traits::kHeadDimV> load_v(KvRows<Element>(params.v, params.page, seq, kv_head_idx),
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
  const auto score_coords = accumulator_coords<Traits, kTileN>();
  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));

  load_q.load(tile.m_begin, sQ);
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
    apply_score<Traits::kScore>(scores, score_coords, params.score, seq, tile.head_idx, tile.m_begin, n * kTileN);
    if (range.needs_mask(n)) apply_mask(scores, score_coords, keys, tile.m_begin, n * kTileN);
    softmax.update(scores, output, reducer);
    if constexpr (Traits::kScore == Score::kGeneral) {
      if (params.dropout.rng_state != nullptr) {
        DropoutMask(params.dropout, params.heads.num_heads, seq.batch_idx, tile.head_idx)
            .template apply<(Traits::kWarpsN > 1 ? 1 : 4)>(scores, score_coords, tile.m_begin, n * kTileN);
      }
    }
    auto probabilities = Probabilities<Traits>::put(smem, tSrS);

    cp_async_wait<0>();
    __syncthreads();  // V(n) and the warps' shares of P are there, and every warp is done with K(n)
    if (n > range.begin) load_k.load((n - 1) * kTileN, sK);
    cp_async_fence();

    Probabilities<Traits>::multiply(tOrO, probabilities, tOrV, tOsV, copy_v);
  }
  __syncthreads();  // O leaves through the shared memory of Q
}

// How this kernel's lanes make one value per row.
template <class Traits>
__device__ auto make_row_reducer(typename Traits::SharedStorage& smem) {
  if constexpr (Traits::kWarpsN > 1) {
    const auto coords = accumulator_coords<Traits, Traits::kTileN>();
    const int warp_idx = threadIdx.x / kThreadsPerWarp;
    return CrossWarpReducer<Traits::kWarpsN, Traits::kTileM, decltype(coords)>(smem.rows, warp_idx / Traits::kWarpsM,
                                                                               coords);
  } else {
    return QuadReducer{};
  }
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
  if (tile.has_used_rows()) forward_mainloop<Traits>(params, tile, smem, softmax, reducer, tOrO);

  const float sink = params.sink.scores == nullptr ? -INFINITY : params.sink.scores[tile.head_idx];
  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));
  auto lse = softmax.finish(output, reducer, sink, params.dropout.rescale);
  clear_unused_rows<Traits>(tile, output, lse);
  store_lse<Traits>(params, tile, lse);
  store_output<Traits>(params, tile, smem, tOrO);
}

}  // namespace flash_attn::sm80
