// The consumers' side: in which order a warpgroup computes S, the softmax and O over the tiles of keys.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/convert.h"
#include "kernels/common/row_reducer.h"
#include "kernels/sm90/forward_traits.h"
#include "kernels/sm90/tile_softmax.h"
#include "kernels/sm90/turns.h"
#include "kernels/sm90/visited_keys.h"
#include "kernels/sm90/wgmma.h"

namespace flash_attn::sm90 {

using namespace cute;

// S(n - 1) = Q K(n - 1)' is started before O += P(n) V(n), so that the tensor cores work on the latter while this
// warpgroup computes the softmax of the former; and warpgroups take turns in starting the pair.
template <class Traits>
class OverlappedSchedule {
 public:
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;

  __device__ OverlappedSchedule(SharedStorage& smem, int group) : smem_(smem), group_(group) { Turns::open(group); }

  // Accumulates O of this warpgroup's rows. They see some keys, and Q is there. `score(scores, n_idx)` makes scores of
  // Q K'; `meanwhile()` is called beside the first product, which nothing else overlaps.
  template <class Score, class Meanwhile, class Softmax, class AccO>
  __device__ void accumulate(const GroupKeys& seen, int q_stage, const Score& score, const Meanwhile& meanwhile,
                             Softmax& softmax, AccO& tOrO) {
    const KvRange& range = seen.range;
    Tensor sK = make_tensor(make_smem_ptr(&smem_.k[0][0]), typename Traits::SmemLayoutK{});
    Tensor sVt = make_tensor(make_smem_ptr(&smem_.v[0][0]), typename Traits::SmemLayoutVt{});
    typename Traits::TiledMmaQK mma_qk;
    typename Traits::TiledMmaPV mma_pv;
    const auto group_qk = mma_qk.get_slice(group_ * kThreadsPerWarpgroup);
    const auto group_pv = mma_pv.get_slice(group_ * kThreadsPerWarpgroup);
    Tensor tSrQ = queries(group_qk, q_stage);                // (MMA, MMA_M, MMA_K)
    const Tensor tSrK = group_qk.partition_fragment_B(sK);   // (MMA, MMA_N, MMA_K, stage)
    const Tensor tOrV = group_pv.partition_fragment_B(sVt);  // (MMA, MMA_N over head_dim_v, MMA_K, stage)
    Tensor tSrS = make_accumulator<Traits::kTileN>();
    Tensor tOrP = make_tensor<Element>(as_a_operand(tSrS.layout()));  // (MMA, MMA_M, MMA_K)
    Tensor scores = make_tensor(tSrS.data(), as_rows_and_columns(tSrS.layout()));
    Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));

    skip(seen.num_before);
    wait_full(smem_.barriers.k, k_);
    start_scores(mma_qk, tSrQ, tSrK(_, _, _, k_.idx), tSrS);
    meanwhile();
    wait_for_gemms<0>(tSrS);
    release(smem_.barriers.k, k_);
    score(scores, range.end - 1);
    auto factors = exponentiate(softmax, scores);

    // The loop's edge lies between the softmax and the wait for the product beside it: within one block of straight
    // code nvcc 13.0 moves that wait in front of the softmax, and nothing overlaps.
    for (int n = range.end - 2;; --n) {
      wait_for_gemms<0>(tOrO);
      if (n < range.end - 2) release(smem_.barriers.v[0], v_);
      round_to(tOrP, tSrS);
      if constexpr (!kRescaleBesideScores) rescale_output<Traits, Softmax>(output, factors);
      if (n < range.begin) break;

      wait_full(smem_.barriers.k, k_);
      Turns::before_products(group_);
      start_scores(mma_qk, tSrQ, tSrK(_, _, _, k_.idx), tSrS);
      if constexpr (kRescaleBesideScores) rescale_output<Traits, Softmax>(output, factors);
      wait_full(smem_.barriers.v[0], v_);
      start_gemm(mma_pv, tOrP, tOrV(_, _, _, v_.idx), tOrO, GMMA::ScaleOut::One);
      Turns::after_products(group_);

      wait_for_gemms<1>(tSrS);
      release(smem_.barriers.k, k_);
      score(scores, n);
      factors = exponentiate(softmax, scores);
    }

    if constexpr (kRescaleBesideScores) rescale_output<Traits, Softmax>(output, factors);
    wait_full(smem_.barriers.v[0], v_);
    start_gemm(mma_pv, tOrP, tOrV(_, _, _, v_.idx), tOrO, GMMA::ScaleOut::One);
    wait_for_gemms<0>(tOrO);
    release(smem_.barriers.v[0], v_);
    skip(seen.num_after);
  }

  // The same for rows that see no keys, though others of the tile may: all of its steps.
  __device__ void skip_all(int num_steps) {
    if (num_steps == 0) return;
    // As many turns as other groups take.
    skip(num_steps - Turns::kStepsWithoutTurn);
    for (int i = 0; i < Turns::kStepsWithoutTurn; ++i) release_unread();
  }

  template <class Softmax, class Output>
  __device__ auto finish(Softmax& softmax, Output& output, const typename Softmax::RowTensor& sinks) const {
    return softmax.finish(output, QuadReducer{}, sinks, 1.f);
  }

  __device__ bool owns_lse() const { return true; }

 private:
  using Turns = TurnsOf<Traits>;
  // A wider O takes longer to rescale than anything else between the softmax and the next product: S goes first, and O
  // is rescaled beside it.
  static constexpr int kMaxColsRescaledFirst = 128;
  static constexpr bool kRescaleBesideScores = Traits::kHeadDimV > kMaxColsRescaledFirst;

  // As the first product takes them: descriptors, or the rows themselves.
  template <class GroupMma>
  __device__ auto queries(const GroupMma& group_qk, int q_stage) const {
    if constexpr (Traits::kQueriesInRegisters) {
      return load_a_operand<Traits::kTileM, Traits::kHeadDim>(smem_.q_or_o[q_stage], group_ * Traits::kGroupRows);
    } else {
      Tensor sQ = make_tensor(make_smem_ptr(&smem_.q_or_o[0][0]), typename Traits::SmemLayoutQ{});
      return group_qk.partition_fragment_A(sQ)(_, _, _, q_stage);
    }
  }
  template <class TiledMma, class FragQ, class FragK, class AccS>
  static __device__ void start_scores(const TiledMma& mma, FragQ& q, const FragK& k, AccS& tSrS) {
    start_gemm_steps<Traits::kScoreSteps>(mma, q, k, tSrS, 0, GMMA::ScaleOut::Zero);
  }
  // Steps that only other groups' rows see: this one takes its turn and releases the stages unread.
  __device__ void skip(int num_steps) {
    for (int i = 0; i < num_steps; ++i) {
      Turns::skip(group_);
      release_unread();
    }
  }
  // A stage can be released only when it is full. The warp's lanes meet before that: otherwise the stage could be
  // filled twice more before a lane that lags looks, and finds the parity that it takes for "not yet". In accumulate()
  // the matrix products bring the lanes together.
  __device__ void release_unread() {
    wait_full(smem_.barriers.k, k_);
    __syncwarp();
    release(smem_.barriers.k, k_);
    wait_full(smem_.barriers.v[0], v_);
    __syncwarp();
    release(smem_.barriers.v[0], v_);
  }

  template <class Softmax, class Scores>
  __device__ auto exponentiate(Softmax& softmax, Scores& scores) const {
    Turns::before_exponentials(group_);
    const auto factors = exponentiate_scores<Traits>(softmax, scores);
    Turns::after_exponentials(group_);
    return factors;
  }

  SharedStorage& smem_;
  int group_;
  StageCursor<Traits::kKvStages> k_;
  StageCursor<Traits::kKvStages> v_;
};

}  // namespace flash_attn::sm90
