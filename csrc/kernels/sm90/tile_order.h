// Which tiles of query rows a thread block computes, in which order: the producer finds out and tells the consumers.
#pragma once

#include "kernels/common/row_map.h"
#include "kernels/common/seq_info.h"
#include "kernels/sm90/instructions.h"
#include "kernels/sm90/tile_id.h"

namespace flash_attn::sm90 {

// As flash_attn::locate_tile, for packed rows. Where keys are split, a run has one part of its tiles' keys.
template <int kTileM>
__device__ TileId locate_packed_tile(const ForwardParams& params, const FastDivisor& num_splits, int idx) {
  const SeqParams& seq = params.seq;
  const FastDivisor& packed_heads = params.split.packed_heads;
  const int num_runs = packed_heads.divide(params.heads.num_heads);
  const int tile_idx = params.tiles_per_head - 1 - idx % params.tiles_per_head;
  const int part_of_run = idx / params.tiles_per_head;
  const int run = num_splits.divide(part_of_run);
  const int part = part_of_run - run * num_splits.divisor();
  const int first_head = run % num_runs * packed_heads.divisor();
  if (seq.cu_seqlens_q == nullptr) return {run / num_runs, first_head, tile_idx * kTileM, part};
  const TileSlot slot = varlen_tile(seq.cu_seqlens_q, seq.batch, seq.rows_q, tile_idx, kTileM, packed_heads.divisor());
  return {slot.entry, first_head, slot.row_begin, part};
}

// This thread block's part of the rows of its cluster. It may have none, or none in use, and takes part all the same.
template <class Traits>
__device__ PackedTile tile_of_block(const PackedTile& cluster_tile) {
  PackedTile tile = cluster_tile;
  tile.m_begin += Traits::Cluster::block_idx() * Traits::kTileM;
  return tile;
}

// How clusters of thread blocks go through their tiles. Where the lengths are known before the launch, n clusters take
// n units a round, each `step` places further on in the round than in the last one. Where a mask makes tiles of unequal
// length a unit is a pair of them, the run's last tile and its first, the last but one and the second, all about
// equally long together. Lengths on the device say too late which tiles are long: each cluster takes the next unit when
// it has time for one.
struct TileOrder {
  int num_units;
  int units_per_run;
  int step;
  bool pairs;
  FastDivisor num_splits;
  int* counter;  // of units that were taken, but for each cluster's first; null: in rounds
};

// The units of one cluster.
class UnitCursor {
 public:
  __device__ explicit UnitCursor(int cluster) : place_(cluster) {}

  __device__ int unit() const { return round_begin_ + place_; }
  __device__ void advance(const TileOrder& order, int num_clusters) {
    if (order.counter != nullptr) {
      place_ = num_clusters + fetch_and_increment(order.counter);
      return;
    }
    round_begin_ += num_clusters;
    place_ += order.step;
    if (place_ >= num_clusters) place_ -= num_clusters;
  }

 private:
  int round_begin_ = 0;
  int place_;
};

// Calls `work(id)` for each tile of this thread block's cluster, some of which have no rows.
template <class Traits, class Work>
__device__ void for_each_tile(const ForwardParams& params, const TileOrder& order, const Work& work) {
  const int tiles_per_run = params.tiles_per_head;
  const int num_clusters = gridDim.x / Traits::Cluster::kNumBlocks;
  for (UnitCursor cursor(blockIdx.x / Traits::Cluster::kNumBlocks); cursor.unit() < order.num_units;
       cursor.advance(order, num_clusters)) {
    const int unit = cursor.unit();
    const int run_begin = unit / order.units_per_run * tiles_per_run;
    const int first = unit % order.units_per_run;
    const int partner = tiles_per_run - 1 - first;
    for (int position = first;; position = partner) {
      work(locate_packed_tile<Traits::kClusterM>(params, order.num_splits, run_begin + position));
      if (!order.pairs || position >= partner) break;
    }
  }
}

}  // namespace flash_attn::sm90
