// Which tiles of query rows a thread block computes, in which order. Producer and consumers see the same ones.
#pragma once

#include "kernels/common/kv_range.h"
#include "kernels/common/row_map.h"
#include "kernels/common/seq_info.h"
#include "kernels/sm90/instructions.h"

namespace flash_attn::sm90 {

// As flash_attn::locate_tile, for packed rows.
template <int kTileM>
__device__ PackedTile locate_packed_tile(const ForwardParams& params, int idx) {
  const SeqParams& seq = params.seq;
  const FastDivisor& packed_heads = params.split.packed_heads;
  const int num_runs = packed_heads.divide(params.heads.num_heads);
  const int tile_idx = params.tiles_per_head - 1 - idx % params.tiles_per_head;
  const int run = idx / params.tiles_per_head;
  const PackedRows rows{run % num_runs * packed_heads.divisor(), packed_heads};
  if (seq.cu_seqlens_q == nullptr) return {entry_info(seq, run / num_runs), rows, tile_idx * kTileM};
  const TileSlot slot = varlen_tile(seq.cu_seqlens_q, seq.batch, seq.rows_q, tile_idx, kTileM, packed_heads.divisor());
  return {entry_info(seq, slot.entry), rows, slot.row_begin};
}

// The tile, its keys counted from the first one that any of its rows sees: what lies before that may be anything, NaN
// too, which even a probability of 0 would spread, and TMA can't replace it by zeros as it does past the last key.
template <class Traits>
__device__ PackedTile without_unseen_keys(const ForwardParams& params, PackedTile tile) {
  using Keys = PackedKeys<Traits::kMask>;
  if (Keys::kHasBegin && tile.has_used_rows()) {
    const int first_seen = Keys{{tile.seq, params.window}, tile.rows}.begin(tile.m_begin);
    tile.seq.row_begin_k += first_seen;
    tile.seq.seqlen_k -= first_seen;
  }
  return tile;
}

// This thread block's part of the rows of its cluster. It may have none, or none in use, and takes part all the same.
template <class Traits>
__device__ PackedTile tile_of_block(const PackedTile& cluster_tile) {
  PackedTile tile = cluster_tile;
  if constexpr (Traits::kClusterBlocks > 1) tile.m_begin += block_of_cluster() * Traits::kTileM;
  return tile;
}

// Tiles of keys that a cluster's tile of queries visits; none where no row is in use.
template <class Traits>
__device__ KvRange visited_keys(const ForwardParams& params, const PackedTile& tile) {
  if (!tile.has_used_rows()) return {};
  const PackedKeys<Traits::kMask> keys{{tile.seq, params.window}, tile.rows};
  return kv_range_of_rows<Traits::kClusterM, Traits::kTileN>(keys, tile.m_begin, tile.num_used_rows());
}

// What a consumer group does with the tiles of keys that its cluster's tile visits.
struct GroupKeys {
  KvRange range;   // those that its own rows see
  int num_before;  // and how many it meets before those, which are all if its rows see none
  int num_after;
};

// Of the rows of `tile` from `group_row` on, a group's. A group without rows in use sees nothing, and one in the upper
// part of a tile less than the others where a mask has edges.
template <class Traits>
__device__ GroupKeys keys_of_group(const ForwardParams& params, const PackedTile& tile, int group_row,
                                   const KvRange& visited) {
  if constexpr (Traits::kRowGroups == 1) return {visited, 0, 0};
  const int m_begin = tile.m_begin + group_row;
  const PackedKeys<Traits::kMask> keys{{tile.seq, params.window}, tile.rows};
  const KvRange own = kv_range_of_rows<Traits::kGroupRows, Traits::kTileN>(keys, m_begin, tile.num_used_rows());
  if (m_begin >= tile.num_used_rows() || own.is_empty()) return {{}, max(visited.end - visited.begin, 0), 0};
  return {own, visited.end - own.end, own.begin - visited.begin};
}

// How clusters of thread blocks go through their tiles: n clusters take n units a round, each `step` places further on
// in the round than in the last one. Where a mask makes tiles of unequal length a unit is a pair of them, the run's
// last tile and its first, the last but one and the second, all about equally long together.
struct TileOrder {
  int num_units;
  int units_per_run;
  int step;
  bool pairs;
};

// Calls `work(tile)` for each tile of this thread block's cluster that has rows.
template <class Traits, class Work>
__device__ void for_each_tile(const ForwardParams& params, const TileOrder& order, const Work& work) {
  const int tiles_per_run = params.tiles_per_head;
  const int num_clusters = gridDim.x / Traits::kClusterBlocks;
  int place = blockIdx.x / Traits::kClusterBlocks;
  for (int round = 0; round + place < order.num_units; round += num_clusters) {
    const int unit = round + place;
    place += order.step;
    if (place >= num_clusters) place -= num_clusters;
    const int run_begin = unit / order.units_per_run * tiles_per_run;
    const int first = unit % order.units_per_run;
    const int partner = tiles_per_run - 1 - first;
    for (int position = first;; position = partner) {
      const PackedTile tile = locate_packed_tile<Traits::kClusterM>(params, run_begin + position);
      if (tile.has_rows()) work(without_unseen_keys<Traits>(params, tile));
      if (!order.pairs || position >= partner) break;
    }
  }
}

}  // namespace flash_attn::sm90
