// Stores a tile of O through shared memory and TMA, or a part's O and log-sum-exp in the workspace.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/convert.h"
#include "kernels/common/split_store.h"
#include "kernels/sm90/producer.h"
#include "kernels/sm90/wgmma.h"

namespace flash_attn::sm90 {

using namespace cute;

// The group's part of O takes the place of a part of Q that no other group reads any more. Returns while it is leaving.
template <class Traits, class AccO>
__device__ void store_output(const ForwardTensorMaps& maps, const PackedTile& tile, typename Traits::Element* smem,
                             int group, const AccO& tOrO) {
  using Element = typename Traits::Element;
  constexpr int kBoxCols = Traits::template kBoxCols<Traits::kGroupCols>;
  const int first_col = Traits::column_group_of(group) * Traits::kGroupCols;
  Element* columns = smem + first_col * Traits::kTileM;
  const int first_row = Traits::row_group_of(group) * Traits::kGroupRows;
  const Tensor rounded = convert_to<Element>(tOrO);
  // A warp's wait for its matrix products says nothing about those of its neighbours, which may read these rows of Q.
  wait_at(NamedBarrier::kOutput, group, kThreadsPerWarpgroup);
  store_accumulator<Traits::kTileM, Traits::kGroupCols>(columns, first_row, rounded);
  fence_smem_writes();
  wait_at(NamedBarrier::kOutput, group, kThreadsPerWarpgroup);

  if (threadIdx.x % kThreadsPerWarpgroup == 0 && tile.m_begin + first_row < tile.num_rows()) {
    const auto box = RowBox<Traits::kGroupRows, kBoxCols>::of_packed_rows(maps.o, tile, first_row);
    box.template store<Traits::kGroupCols>(columns + first_row * kBoxCols, Traits::kTileM * kBoxCols, first_col);
    commit_stores();
  }
}

// Stores a part of the tile's keys in the workspace, a group's rows and columns of it.
template <class Traits, class Coords, class Output, class LseRows>
__device__ void store_part(const ForwardParams& params, const PackedTile& tile, int part, int group,
                           const Coords& coords, const Output& output, const LseRows& lse) {
  const int num_splits = params.split.num_splits;
  const EntrySlots slots = slots_of_entry<Traits::kTileM>(params, tile.seq, tile.rows.num_heads.divisor(), num_splits);
  const int64_t slot = slots.slot_of<Traits::kTileM>(tile.m_begin, part);
  const bool is_first_thread = group == 0 && threadIdx.x % kThreadsPerWarpgroup == 0;
  if (tile.rows.first_head == 0 && is_first_thread && slot == slots.first) {
    note_parts(params, tile.seq.batch_idx, slots.first, num_splits);
  }
  const int num_head_runs = tile.rows.num_heads.divide(params.heads.num_heads);
  const int head_run = tile.rows.num_heads.divide(tile.rows.first_head);
  store_partial<Traits::kTileM>(params, slot * num_head_runs + head_run, tile.num_rows() - tile.m_begin, coords,
                                Traits::column_group_of(group) * Traits::kGroupCols, output, lse);
}

// Releases Q's stages to the producer once O has left through them. With two stages the wait is put off until the next
// tile's first product runs.
template <class Traits>
class LeavingOutput {
 public:
  __device__ explicit LeavingOutput(typename Traits::SharedStorage& smem) : smem_(smem) {}

  // O of the stage that comes next has started to leave.
  __device__ void add() {
    is_pending_ = true;
    if constexpr (Traits::kQStages == 1) release_stage();
  }
  // Waits until it has left; with one stage, add() has.
  __device__ void release_stage() {
    if (!is_pending_) return;
    is_pending_ = false;
    // The thread that stored waits; its warp arrives after that, and the stage needs every warp.
    if (threadIdx.x % kThreadsPerWarpgroup == 0) wait_for_stores();
    __syncwarp();  // all lanes have read the rows' last factors, which are written again when the stage comes back
    release(smem_.barriers.q, cursor_);
  }

 private:
  typename Traits::SharedStorage& smem_;
  StageCursor<Traits::kQStages> cursor_;
  bool is_pending_ = false;
};

}  // namespace flash_attn::sm90
