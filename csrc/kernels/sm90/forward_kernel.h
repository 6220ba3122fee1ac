// The SM90 forward kernel: a producer warpgroup brings tiles of Q, K and V, consumer warpgroups compute 64 rows of O
// each.
#pragma once

#include "kernels/common/instructions.h"
#include "kernels/common/mask.h"
#include "kernels/common/row_map.h"
#include "kernels/common/score.h"
#include "kernels/sm90/consumer_schedule.h"
#include "kernels/sm90/forward_epilogue.h"
#include "kernels/sm90/producer.h"
#include "kernels/sm90/split_columns_schedule.h"

namespace flash_attn::sm90 {

using namespace cute;

template <class Traits>
using ScheduleOf =
    std::conditional_t<(Traits::kColumnGroups > 1), SplitColumnsSchedule<Traits>, OverlappedSchedule<Traits>>;

// How thread blocks go through the tiles: each takes every gridDim.x-th unit. Where a mask makes tiles of unequal
// length a unit is a pair of them, the head's last and its first, the last but one and the second, all equally long
// together.
struct TileOrder {
  int num_units;
  int units_per_run;
  bool pairs;
};

// Calls `work(tile)` for each tile of this thread block that has rows; producer and consumers see the same ones.
template <class Traits, class Work>
__device__ void for_each_tile(const ForwardParams& params, const TileOrder& order, const Work& work) {
  const int tiles_per_run = params.tiles_per_head;
  for (int unit = blockIdx.x; unit < order.num_units; unit += gridDim.x) {
    const int run_begin = unit / order.units_per_run * tiles_per_run;
    const int first = unit % order.units_per_run;
    const int partner = tiles_per_run - 1 - first;
    for (int position = first;; position = partner) {
      const TileCoord tile =
          locate_tile<Traits::kTileM>(params.seq, params.heads.num_heads, tiles_per_run, run_begin + position);
      if (tile.has_rows()) work(tile);
      if (!order.pairs || position >= partner) break;
    }
  }
}

template <class Traits>
__device__ void consume(const ForwardParams& params, const ForwardTensorMaps& maps,
                        typename Traits::SharedStorage& smem, int group, const TileOrder& order) {
  using Softmax = OnlineSoftmax<Traits::kRowsPerLane>;
  ScheduleOf<Traits> schedule(smem, group);
  StageCursor<Traits::kQStages> q;
  LeavingOutput<Traits> leaving(smem);
  typename Traits::TiledMmaPV mma_pv;
  Tensor tOrO = partition_fragment_C(mma_pv, Shape<Int<Traits::kTileM>, Int<Traits::kGroupCols>>{});
  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));
  const int lane = lane_of_rows(row_group_of<Traits>(group));
  const auto score_coords = accumulator_coords<typename Traits::TiledMmaQK, Traits::kTileM, Traits::kTileN>(lane);
  const auto output_coords = accumulator_coords<typename Traits::TiledMmaPV, Traits::kTileM, Traits::kGroupCols>(lane);

  for_each_tile<Traits>(params, order, [&](const TileCoord& tile) {
    const KvRange range = visited_keys<Traits>(params, tile);
    const VisibleKeys<Traits::kMask> keys{tile.seq, params.window};
    const auto score = [&](auto& scores, int n_idx) {
      const int n_begin = n_idx * Traits::kTileN;
      apply_score<Traits::kScore>(scores, score_coords, params.score, tile.seq, HeadRows{tile.head_idx}, tile.m_begin,
                                  n_begin);
      if (range.needs_mask(n_idx)) apply_mask(scores, score_coords, keys, tile.m_begin, n_begin);
    };
    clear(tOrO);
    Softmax softmax(params.score.softmax_scale);
    wait_full(smem.barriers.q, q);
    const auto release_last = [&] { leaving.release_stage(); };
    if (range.is_empty()) {
      release_last();
    } else {
      schedule.accumulate(range, q.idx, score, release_last, softmax, tOrO);
    }

    const float sink = params.sink.scores == nullptr ? -INFINITY : params.sink.scores[tile.head_idx];
    auto lse = schedule.finish(softmax, output, sink);
    clear_unused_rows<Traits::kTileM>(tile.m_begin, tile.seq.seqlen_q, output_coords, output, lse);
    if (schedule.owns_lse()) store_lse(params, tile, output_coords, lse);
    store_output<Traits>(params, maps, tile, smem.q_or_o[q.idx], group, tOrO);
    leaving.add();
    q.advance();
  });
  leaving.release_stage();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams params, const __grid_constant__ ForwardTensorMaps maps,
                   const TileOrder order) {
  // Dynamic shared memory begins at a multiple of 1024 bytes where there is no other.
  auto& smem = dynamic_smem<typename Traits::SharedStorage>();

  if (threadIdx.x == 0) {
    smem.barriers.q.init(Traits::kTile.num_warps());
    smem.barriers.k.init(Traits::kTile.warps_m);
    for (auto& stages : smem.barriers.v) stages.init(Traits::kTile.warps_m);
    fence_barrier_init();
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.o}) prefetch_descriptor(*map);
  }
  __syncthreads();

  const int group = warpgroup_idx();
  if (group == 0) {
    give_up_registers<Traits::kProducerRegisters>();
    if (warp_idx() == 0 && is_elected_lane()) {
      Producer<Traits, TmaKvSource> producer(params, maps, smem);
      for_each_tile<Traits>(params, order, [&](const TileCoord& tile) { producer.bring(tile); });
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Traits>(params, maps, smem, group - 1, order);
  }
}

}  // namespace flash_attn::sm90
