// The SM80 backward kernel: one thread block computes dK and dV of one tile of keys, or of a part of their columns, and
// that tile's share of dQ (Dao et al. 2022, arXiv:2205.14135, algorithm 4; Dao 2023, arXiv:2307.08691, algorithm 2).
#pragma once

#include "kernels/common/backward_params.h"
#include "kernels/common/instructions.h"
#include "kernels/common/kv_range.h"
#include "kernels/common/row_address.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/backward_traits.h"
#include "kernels/sm80/dq_sums.h"
#include "kernels/sm80/gemm.h"
#include "kernels/sm80/key_tile.h"
#include "kernels/sm80/softmax_backward.h"
#include "kernels/sm80/tile_loader.h"
#include "kernels/sm80/tile_store.h"
#include "variant/rounding.h"

namespace flash_attn::sm80 {

using namespace cute;

// One tile of query rows of one of the query heads that share the keys. Steps run through rows, then heads.
struct QueryStep {
  int head_idx;
  int m_idx;

  __device__ QueryStep after(int m_first, int m_end) const {
    return m_idx + 1 < m_end ? QueryStep{head_idx, m_idx + 1} : QueryStep{head_idx + 1, m_first};
  }
};

// Starts the copies of a step's Q and dO.
template <class Traits>
__device__ void load_queries(const BackwardParams& params, const SeqInfo& seq, const QueryStep& step,
                             typename Traits::SharedStorage& smem, int stage) {
  using Element = typename Traits::Element;
  const TileLoader<Traits, Traits::kTileM, Traits::kHeadDim> load_q(
      row_of<Element>(params.q, seq.batch_idx, seq.row_begin_q, step.head_idx), params.q.row_stride, seq.seqlen_q,
      params.heads.head_dim);
  const TileLoader<Traits, Traits::kTileM, Traits::kHeadDimV> load_dout(
      row_of<Element>(params.dout, seq.batch_idx, seq.row_begin_q, step.head_idx), params.dout.row_stride, seq.seqlen_q,
      params.heads.head_dim_v);
  const int m_begin = step.m_idx * Traits::kTileM;
  load_q.load(m_begin, smem.q[stage]);
  load_dout.load(m_begin, smem.dout[stage]);
}

// Starts the copies of the thread block's K and V.
template <class Traits>
__device__ void load_keys(const BackwardParams& params, const KeyTileCoord& tile, const KeySpan& seen,
                          typename Traits::SharedStorage& smem) {
  using Element = typename Traits::Element;
  const SeqInfo& seq = tile.seq;
  const TileLoader<Traits, Traits::kTileN, Traits::kHeadDim, RowsBetween> load_k(
      row_of<Element>(params.k, seq.batch_idx, seq.row_begin_k, tile.kv_head_idx), params.k.row_stride, seen,
      params.heads.head_dim);
  const TileLoader<Traits, Traits::kTileN, Traits::kHeadDimV, RowsBetween> load_v(
      row_of<Element>(params.v, seq.batch_idx, seq.row_begin_k, tile.kv_head_idx), params.v.row_stride, seen,
      params.heads.head_dim_v);
  load_k.load(tile.n_begin, smem.k);
  load_v.load(tile.n_begin, smem.v);
}

// S = Q K', dP = dO V', and from them P and dS, which go to shared memory.
template <class Traits, class Tile>
__device__ void compute_scores(const BackwardParams& params, const VisibleKeys<Mask::kGeneral>& keys, const Tile& tile,
                               typename Traits::SharedStorage& smem, int stage) {
  using Mma = typename Traits::MmaScores;
  Tensor tSrS = Mma::template make_accumulator<Traits::kTileM, Traits::kTileN>();  // (MMA, MMA_M, MMA_N)
  clear(tSrS);
  gemm<Mma>(tSrS, operand_a<Mma, Along::kRows, typename Traits::TileQ>(smem.q[stage]),
            operand_b<Mma, Along::kRows, typename Traits::TileK>(smem.k));
  Tensor tSrDp = Mma::template make_accumulator<Traits::kTileM, Traits::kTileN>();
  clear(tSrDp);
  gemm<Mma>(tSrDp, operand_a<Mma, Along::kRows, typename Traits::TileDout>(smem.dout[stage]),
            operand_b<Mma, Along::kRows, typename Traits::TileV>(smem.v));

  Tensor scores = make_tensor(tSrS.data(), as_rows_and_columns(tSrS.layout()));
  Tensor grads = make_tensor(tSrDp.data(), as_rows_and_columns(tSrDp.layout()));
  softmax_backward<Traits>(scores, grads, Traits::score_coords(), params, keys, tile);
  round_to_smem<Mma, Traits::kTileM, Traits::kTileN>(smem.p, tSrS);
  round_to_smem<Mma, Traits::kTileM, Traits::kTileN>(smem.ds, tSrDp);
}

// dV += P' dO and dK += dS' Q, on this thread block's columns.
template <class Traits, class AccDk, class AccDv>
__device__ void accumulate_dkv(typename Traits::SharedStorage& smem, int stage, int column_block, AccDk& tKrDk,
                               AccDv& tVrDv) {
  using Mma = typename Traits::MmaDkv;
  auto* dout = columns_of<Traits::kTileM, Traits::kColumnsV>(smem.dout[stage], column_block);
  auto* q = columns_of<Traits::kTileM, Traits::kColumns>(smem.q[stage], column_block);
  gemm<Mma>(tVrDv, operand_a<Mma, Along::kCols, typename Traits::TileScores>(smem.p),
            operand_b<Mma, Along::kCols, typename Traits::ColumnsDout>(dout));
  gemm<Mma>(tKrDk, operand_a<Mma, Along::kCols, typename Traits::TileScores>(smem.ds),
            operand_b<Mma, Along::kCols, typename Traits::ColumnsQ>(q));
}

// dQ += dS K, on this thread block's columns.
template <class Traits>
__device__ void accumulate_dq(const BackwardParams& params, const SeqInfo& seq, const QueryStep& step, int turn,
                              typename Traits::SharedStorage& smem, int column_block) {
  using Mma = typename Traits::MmaDq;
  auto* k = columns_of<Traits::kTileN, Traits::kColumns>(smem.k, column_block);
  Tensor tQrDq = Mma::template make_accumulator<Traits::kTileM, Traits::kColumns>();
  clear(tQrDq);
  gemm<Mma>(tQrDq, operand_a<Mma, Along::kRows, typename Traits::TileScores>(smem.ds),
            operand_b<Mma, Along::kCols, typename Traits::ColumnsK>(k));

  const int64_t tile_idx = dq_tile_idx<Traits>(params, seq, step.head_idx, step.m_idx);
  float* sums = dq_sums_of<Traits>(params, tile_idx, column_block);
  if (params.turns.counters == nullptr) {
    add_to_dq<Traits>(sums, tQrDq);
  } else {
    int* counter = params.turns.counters + tile_idx * Traits::kColumnBlocks + column_block;
    add_to_dq_in_turn<Traits>(sums, tQrDq, counter, turn, params.turns.are_lost);
  }
}

// With two stages, a step's Q and dO arrive while the step before it is computed.
template <class Traits, class AccDk, class AccDv>
__device__ void backward_mainloop(const BackwardParams& params, const KeyTileCoord& tile, int column_block,
                                  typename Traits::SharedStorage& smem, AccDk& tKrDk, AccDv& tVrDv) {
  constexpr int kTileM = Traits::kTileM;
  constexpr int kTileN = Traits::kTileN;
  const SeqInfo& seq = tile.seq;
  const VisibleKeys<Mask::kGeneral> keys{seq, params.window};
  const RowRange rows = query_range(keys, tile.n_begin, tile.n_begin + kTileN);
  if (rows.is_empty()) return;
  const int m_first = rows.begin / kTileM;
  const int m_end = ceil_div(rows.end, kTileM);
  const int n_idx = tile.n_begin / kTileN;
  const int head_end = (tile.kv_head_idx + 1) * params.heads.num_heads_per_kv;

  QueryStep step{tile.kv_head_idx * params.heads.num_heads_per_kv, m_first};
  load_keys<Traits>(params, tile, {keys.begin(0), seq.seqlen_k}, smem);
  load_queries<Traits>(params, seq, step, smem, 0);
  cp_async_fence();

  for (int stage = 0; step.head_idx < head_end; stage = (stage + 1) % Traits::kStages) {
    const QueryStep next = step.after(m_first, m_end);
    const KvRange range = kv_range<Mask::kGeneral, kTileM, kTileN>(keys, step.m_idx * kTileM);
    ScoreTile<Traits::kRowsPerLane> scores{step.head_idx, step.m_idx * kTileM, tile.n_begin, range.needs_mask(n_idx)};
    scores.load_rows(params.rows, seq, Traits::score_coords());

    cp_async_wait<0>();
    __syncthreads();  // Q and dO have landed, and every warp is done with the step before
    if (Traits::kStages > 1 && next.head_idx < head_end) load_queries<Traits>(params, seq, next, smem, 1 - stage);
    cp_async_fence();

    compute_scores<Traits>(params, keys, scores, smem, stage);
    __syncthreads();  // P and dS are there
    accumulate_dkv<Traits>(smem, stage, column_block, tKrDk, tVrDv);
    accumulate_dq<Traits>(params, seq, step, n_idx - range.begin, smem, column_block);

    if (Traits::kStages == 1 && next.head_idx < head_end) {
      __syncthreads();  // every warp is done with Q and dO
      load_queries<Traits>(params, seq, next, smem, 0);
      cp_async_fence();
    }
    step = next;
  }
  __syncthreads();  // dK and dV leave through the shared memory of K and V
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads) backward_kernel(const __grid_constant__ BackwardParams params) {
  auto& smem = dynamic_smem<typename Traits::SharedStorage>();

  const int column_block = blockIdx.x % Traits::kColumnBlocks;
  const KeyTileCoord tile =
      locate_key_tile<Traits::kTileN>(params.seq, params.heads.num_heads / params.heads.num_heads_per_kv,
                                      params.key_tiles_per_head, blockIdx.x / Traits::kColumnBlocks);
  if (!tile.has_rows()) return;

  using Mma = typename Traits::MmaDkv;
  Tensor tKrDk = Mma::template make_accumulator<Traits::kTileN, Traits::kColumns>();   // (MMA, MMA_M, MMA_N)
  Tensor tVrDv = Mma::template make_accumulator<Traits::kTileN, Traits::kColumnsV>();  // (MMA, MMA_M, MMA_N)
  clear(tKrDk);
  clear(tVrDv);
  backward_mainloop<Traits>(params, tile, column_block, smem, tKrDk, tVrDv);

  CUTE_UNROLL
  for (int i = 0; i < size(tKrDk); ++i) tKrDk(i) *= params.grad_scale;
  CUTE_UNROLL
  for (int i = 0; i < size(tVrDv); ++i) tVrDv(i) *= params.dropout.rescale;
  const RowBlock rows{tile.seq.batch_idx, tile.seq.row_begin_k, tile.n_begin, tile.seq.rows_k};
  store_tile<Traits, Mma, Traits::kTileN, Traits::kColumns>(
      params.dk, rows, tile.kv_head_idx, {column_block * Traits::kColumns, params.heads.head_dim}, smem.k, tKrDk);
  store_tile<Traits, Mma, Traits::kTileN, Traits::kColumnsV>(
      params.dv, rows, tile.kv_head_idx, {column_block * Traits::kColumnsV, params.heads.head_dim_v}, smem.v, tVrDv);
}

}  // namespace flash_attn::sm80
