// The SM90 forward kernel: a producer warpgroup loads tiles of Q, K and V, consumer warpgroups compute 64 rows of O
// each.
#pragma once

#include "kernels/common/instructions.h"
#include "kernels/common/mask.h"
#include "kernels/common/online_softmax.h"
#include "kernels/common/row_results.h"
#include "kernels/common/score.h"
#include "kernels/sm90/announced_tiles.h"
#include "kernels/sm90/consumer_schedule.h"
#include "kernels/sm90/forward_epilogue.h"
#include "kernels/sm90/producer.h"
#include "kernels/sm90/split_columns_schedule.h"
#include "kernels/sm90/tile_order.h"
#include "kernels/sm90/visited_keys.h"

namespace flash_attn::sm90 {

using namespace cute;

template <class Traits>
using ScheduleOf =
    std::conditional_t<(Traits::kColumnGroups > 1), SplitColumnsSchedule<Traits>, OverlappedSchedule<Traits>>;

template <class Traits>
__device__ void consume(const ForwardParams& params, const ForwardTensorMaps& maps,
                        typename Traits::SharedStorage& smem, int group) {
  using Softmax = OnlineSoftmax<Traits::kRowsPerLane>;
  ScheduleOf<Traits> schedule(smem, group);
  StageCursor<Traits::kQStages> q;
  LeavingOutput<Traits> leaving(smem);
  Tensor tOrO = make_accumulator<Traits::kGroupCols>();
  Tensor output = make_tensor(tOrO.data(), as_rows_and_columns(tOrO.layout()));
  const int first_row = Traits::row_group_of(group) * Traits::kGroupRows;
  const auto score_coords = accumulator_coords<Traits::kTileN>(first_row);
  const auto output_coords = accumulator_coords<Traits::kGroupCols>(first_row);

  for_each_announced_tile<Traits>(params, smem, [&](const PackedTile& cluster_tile, const TileId& id) {
    const PackedTile tile = tile_of_block<Traits>(cluster_tile);
    const KvRange visited = visited_keys<Traits>(params, cluster_tile, id.part);
    const GroupKeys seen = keys_of_group<Traits>(params, tile, first_row, visited);
    const PackedKeys<Traits::kMask> keys{{tile.seq, params.window}, tile.rows};
    const auto score = [&](auto& scores, int n_idx) {
      const int n_begin = n_idx * Traits::kTileN;
      apply_score<Traits::kScore>(scores, score_coords, params.score, tile.seq, tile.rows, tile.m_begin, n_begin);
      if (seen.range.needs_mask(n_idx)) apply_mask(scores, score_coords, keys, tile.m_begin, n_begin);
    };
    clear(tOrO);
    Softmax softmax(params.score.softmax_scale);
    wait_full(smem.barriers.q, q);
    const auto release_last = [&] { leaving.release_stage(); };
    if (seen.range.is_empty()) {
      release_last();
      schedule.skip_all(seen.num_before);
    } else {
      schedule.accumulate(seen, q.idx, score, release_last, softmax, tOrO);
    }

    // The sinks join when the parts meet.
    const bool is_part = params.split.num_splits > 1 && tile.seq.batch_idx < params.seq.batch;
    const auto sinks = sinks_of_rows<Softmax>(is_part ? nullptr : params.sink.scores, tile, output_coords);
    auto lse = schedule.finish(softmax, output, sinks);
    clear_unused_rows<Traits::kTileM>(tile.m_begin, tile.num_used_rows(), output_coords, output, lse);
    if (is_part) {
      store_part<Traits>(params, tile, id.part, group, output_coords, output, lse);
    } else if (id.part == 0) {  // rows of no entry are not merged
      if (schedule.owns_lse()) store_packed_lse(params, tile, output_coords, lse);
      store_output<Traits>(maps, tile, smem.q_or_o[q.idx], group, tOrO);
    }
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
    smem.barriers.tile_ids.init(Traits::kTile.num_warps());
    smem.barriers.q.init(Traits::kTile.num_warps());
    smem.barriers.k.init(Traits::kTile.warps_m);
    for (auto& stages : smem.barriers.v) stages.init(Traits::kTile.warps_m);
    fence_barrier_init();
    for (const TensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.o}) prefetch_descriptor(map->descriptor);
  }
  Traits::Cluster::sync();

  const int group = warpgroup_idx();
  if (group == 0) {
    give_up_registers<Traits::kProducerRegisters>();
    if (warp_idx() == 0 && is_elected_lane()) {
      if (params.page.table == nullptr) {
        Producer<Traits, RowKvSource>(params, maps, smem).load_all(order);
      } else {
        Producer<Traits, PagedKvSource>(params, maps, smem).load_all(order);
      }
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Traits>(params, maps, smem, group - 1);
  }
  Traits::Cluster::sync_before_leaving();
}

}  // namespace flash_attn::sm90
