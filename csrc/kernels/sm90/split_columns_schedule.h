// The consumers' side where O of 64 rows is too wide for one warpgroup's registers: two groups own half of its columns
// each, and S is computed once.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/convert.h"
#include "kernels/common/online_softmax.h"
#include "kernels/common/row_reducer.h"
#include "kernels/sm90/forward_traits.h"
#include "kernels/sm90/tile_softmax.h"
#include "kernels/sm90/visited_keys.h"
#include "kernels/sm90/wgmma.h"

namespace flash_attn::sm90 {

using namespace cute;

// Group 0 computes S, the softmax and its half of O as in OverlappedSchedule, and hands P and the rows' factors through
// shared memory to group 1, which adds P V to its own half while group 0 computes the next softmax.
template <class Traits>
class SplitColumnsSchedule {
 public:
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Softmax = OnlineSoftmax<Traits::kRowsPerLane>;
  using SmemLayoutP = typename Traits::template SmemLayout<Traits::kTileM, Traits::kTileN, Traits::kPStages>;
  static constexpr int kNumThreads = 2 * kThreadsPerWarpgroup;

  __device__ SplitColumnsSchedule(SharedStorage& smem, int group) : smem_(smem), group_(group) {
    if (owns_lse()) return;
    for (int stage = 0; stage < Traits::kPStages; ++stage) arrive_at(NamedBarrier::kProbsEmpty, stage, kNumThreads);
  }

  __device__ bool owns_lse() const { return group_ == 0; }

  // Accumulates this group's columns of O. The rows see some keys, and Q is there. `score(scores, n_idx)` makes scores
  // of Q K'; `meanwhile()` is called beside the first product.
  template <class Score, class Meanwhile, class AccO>
  __device__ void accumulate(const GroupKeys& seen, int q_stage, const Score& score, const Meanwhile& meanwhile,
                             Softmax& softmax, AccO& tOrO) {
    if (owns_lse()) {
      lead(seen.range, q_stage, score, meanwhile, softmax, tOrO);
    } else {
      meanwhile();
      follow(seen.range, tOrO);
    }
  }

  // Groups share their rows: where one sees no keys, none are brought.
  __device__ void skip_all(int) {}

  // Group 0 alone has the rows' sums, and tells group 1 what they make of O.
  template <class Output>
  __device__ auto finish(Softmax& softmax, Output& output, const typename Softmax::RowTensor& sinks) const {
    float* last_factors = smem_.barriers.row_factors.last;
    Tensor factors = make_tensor<float>(Shape<Int<Traits::kRowsPerLane>, _1>{});
    fill(factors, 1.f);
    auto lse = softmax.finish(factors, QuadReducer{}, sinks, 1.f);
    if (owns_lse()) {
      write_rows(last_factors, factors);
      arrive_at(NamedBarrier::kLastFactors, 0, kNumThreads);
    } else {
      wait_at(NamedBarrier::kLastFactors, 0, kNumThreads);
      read_rows(last_factors, factors);
    }
    Softmax::rescale(output, factors);
    return lse;
  }

 private:
  template <class Score, class Meanwhile, class AccO>
  __device__ void lead(const KvRange& range, int q_stage, const Score& score, const Meanwhile& meanwhile,
                       Softmax& softmax, AccO& tOrO) {
    typename Traits::TiledMmaPV mma_pv;
    const auto group_pv = mma_pv.get_slice(0);
    const Tensor tOrV = group_pv.partition_fragment_B(columns_of_group(_0{}));  // (MMA, MMA_N, MMA_K, stage)
    Tensor tSrS = make_accumulator<Traits::kTileN>();
    Tensor tOrP = make_tensor<Element>(as_a_operand(tSrS.layout()));  // (MMA, MMA_M, MMA_K)
    Tensor scores = make_tensor(tSrS.data(), as_rows_and_columns(tSrS.layout()));
    Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));

    start_scores(q_stage, tSrS);
    meanwhile();
    wait_for_scores<0>(tSrS);
    score(scores, range.end - 1);
    auto factors = exponentiate_scores<Traits>(softmax, scores);

    for (int n = range.end - 2;; --n) {
      wait_for_gemms<0>(tOrO);
      if (n < range.end - 2) release(smem_.barriers.v[0], v_);
      round_to(tOrP, tSrS);
      if (n < range.begin) break;

      // All that doesn't have to come before S is beside it.
      start_scores(q_stage, tSrS);
      const int p_stage = hand_over(make_tensor(tOrP.data(), tSrS.layout()), factors);
      rescale_output<Traits, Softmax>(output, factors);
      wait_full(smem_.barriers.v[0], v_);
      start_gemm(mma_pv, tOrP, tOrV(_, _, _, stage_of(v_)), tOrO, GMMA::ScaleOut::One);
      wait_for_scores<1>(tSrS);
      arrive_at(NamedBarrier::kFollow, p_stage, kNumThreads);
      score(scores, n);
      factors = exponentiate_scores<Traits>(softmax, scores);
    }

    const int p_stage = hand_over(make_tensor(tOrP.data(), tSrS.layout()), factors);
    arrive_at(NamedBarrier::kFollow, p_stage, kNumThreads);
    rescale_output<Traits, Softmax>(output, factors);
    wait_full(smem_.barriers.v[0], v_);
    start_gemm(mma_pv, tOrP, tOrV(_, _, _, stage_of(v_)), tOrO, GMMA::ScaleOut::One);
    wait_for_gemms<0>(tOrO);
    release(smem_.barriers.v[0], v_);
  }

  // Group 1: O += P V of its columns, step by step behind group 0.
  template <class AccO>
  __device__ void follow(const KvRange& range, AccO& tOrO) {
    Tensor sP = make_tensor(make_smem_ptr(&smem_.p[0][0]), SmemLayoutP{});
    typename Traits::TiledMmaSharedPV mma_pv;
    const auto group_pv = mma_pv.get_slice(0);
    const Tensor tOrP = group_pv.partition_fragment_A(sP);                      // (MMA, MMA_M, MMA_K, stage)
    const Tensor tOrV = group_pv.partition_fragment_B(columns_of_group(_1{}));  // (MMA, MMA_N, MMA_K, stage)
    Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));
    Tensor factors = make_tensor<float>(Shape<Int<Traits::kRowsPerLane>, _1>{});

    for (int n = range.end - 1; n >= range.begin; --n) {
      wait_at(NamedBarrier::kProbsFull, p_.idx, kNumThreads);
      read_rows(smem_.barriers.row_factors.of_stage[p_.idx], factors);
      rescale_output<Traits, Softmax>(output, factors);
      wait_full(smem_.barriers.v[1], v_);
      wait_at(NamedBarrier::kFollow, p_.idx, kNumThreads);
      Tensor tOrP_stage = tOrP(_, _, _, p_.idx);
      start_gemm(mma_pv, tOrP_stage, tOrV(_, _, _, stage_of(v_)), tOrO, GMMA::ScaleOut::One);
      wait_for_gemms<0>(tOrO);
      release(smem_.barriers.v[1], v_);
      arrive_at(NamedBarrier::kProbsEmpty, p_.idx, kNumThreads);
      p_.advance();
    }
  }

  // V's columns that belong to a group, (columns, keys, stage).
  template <class Group>
  __device__ auto columns_of_group(Group group) const {
    Tensor sVt = make_tensor(make_smem_ptr(&smem_.v[0][0]), typename Traits::SmemLayoutVt{});
    return local_tile(sVt, typename Traits::GroupTileVt{}, make_coord(group, _0{}));
  }
  // Which stage of K or V the cursor is at; a constant where there is one.
  template <int kNumStages>
  static __device__ auto stage_of(const StageCursor<kNumStages>& cursor) {
    if constexpr (Traits::kKvStages == 1) {
      return _0{};
    } else {
      return cursor.idx;
    }
  }

  // S = Q K' of the tile of keys that comes next, a slice of columns as it comes, each a group of products of its own.
  template <class AccS>
  __device__ void start_scores(int q_stage, AccS& tSrS) {
    Tensor sQ = make_tensor(make_smem_ptr(&smem_.q_or_o[q_stage][0]), typename Traits::SmemLayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(&smem_.k[0][0]), typename Traits::SmemLayoutK{});
    typename Traits::TiledMmaQK mma;
    const auto group_mma = mma.get_slice(0);
    Tensor tSrQ = group_mma.partition_fragment_A(sQ)(_, _, _, _0{});          // (MMA, MMA_M, MMA_K)
    Tensor tSrK = group_mma.partition_fragment_B(sK)(_, _, _, stage_of(k_));  // (MMA, MMA_N, MMA_K)
    constexpr int kSteps = decltype(size<2>(tSrK))::value / Traits::kKSlices;
    // The descriptors are the same in each step: nvcc 13.0 would keep all 64 at hand, in spilled registers.
    hide_origin(tSrQ);
    hide_origin(tSrK);
    CUTE_UNROLL
    for (int slice = 0; slice < Traits::kKSlices; ++slice) {
      wait_full(smem_.barriers.k, k_);
      start_gemm_steps<kSteps>(mma, tSrQ, tSrK, tSrS, slice * kSteps,
                               slice == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One);
      k_.advance();
    }
  }

  // Waits until S is done, giving back the slices of K one by one; kNumLater products were started after it.
  template <int kNumLater, class AccS>
  __device__ void wait_for_scores(AccS& tSrS) {
    for_each(make_int_sequence<Traits::kKSlices>{}, [&](auto slice) {
      wait_for_products<kNumLater + Traits::kKSlices - 1 - decltype(slice)::value>();
      release(smem_.barriers.k, k_released_);
    });
    fence_fragment(tSrS);
  }

  // P and the rows' factors to shared memory; returns the stage.
  template <class Probs, class Factors>
  __device__ int hand_over(const Probs& tSrP, const Factors& factors) {
    const int stage = p_.idx;
    wait_at(NamedBarrier::kProbsEmpty, stage, kNumThreads);
    store_accumulator<Traits::kTileM, Traits::kTileN>(smem_.p[stage], 0, tSrP);
    write_rows(smem_.barriers.row_factors.of_stage[stage], factors);
    fence_smem_writes();
    arrive_at(NamedBarrier::kProbsFull, stage, kNumThreads);
    p_.advance();
    return stage;
  }

  // One of the two rows that this thread holds parts of.
  static __device__ int row_of(int i) { return first_row_of_warp(0) + threadIdx.x % kThreadsPerWarp / 4 + 8 * i; }
  template <class Rows>
  static __device__ void write_rows(float* smem, const Rows& rows) {
    if (threadIdx.x % 4 != 0) return;
    CUTE_UNROLL
    for (int i = 0; i < Traits::kRowsPerLane; ++i) smem[row_of(i)] = rows(i);
  }
  template <class Rows>
  static __device__ void read_rows(const float* smem, Rows& rows) {
    CUTE_UNROLL
    for (int i = 0; i < Traits::kRowsPerLane; ++i) rows(i) = smem[row_of(i)];
  }

  SharedStorage& smem_;
  int group_;
  StageCursor<Traits::kKvStages * Traits::kKSlices> k_;           // where products start
  StageCursor<Traits::kKvStages * Traits::kKSlices> k_released_;  // where they end
  StageCursor<Traits::kKvStages> v_;
  StageCursor<Traits::kPStages> p_;
};

}  // namespace flash_attn::sm90
