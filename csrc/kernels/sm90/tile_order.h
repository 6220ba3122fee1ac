// Which tiles of query rows a thread block computes, in which order: the producer finds out and tells the consumers.
#pragma once

#include "kernels/common/kv_range.h"
#include "kernels/common/row_map.h"
#include "kernels/common/seq_info.h"
#include "kernels/sm90/barriers.h"
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

__device__ inline PackedTile packed_tile_of(const ForwardParams& params, const TileId& id) {
  return {entry_info(params.seq, id.entry), {id.first_head, params.split.packed_heads}, id.m_begin};
}

// The first key that a tile counts if `first_seen` is the first one that any of its rows sees: where rows don't come in
// boxes of one page each, that. A box begins at the beginning of one, and TMA replaces what nobody sees in it by zeros;
// but not at both of its ends, so the only box of a tile begins with what is seen.
template <class Traits>
__device__ int first_counted_key(const PageParams& page, int first_seen, int num_keys) {
  if (page.table == nullptr) return first_seen;
  const int box_rows = page_box_rows(page.page_size.divisor(), Traits::kTileN);
  const int box_begin = first_seen & -box_rows;
  return num_keys - box_begin > box_rows ? box_begin : first_seen;
}

// The tile, its keys counted from the first one that any of its rows sees: what lies before that may be anything, NaN
// too, which even a probability of 0 would spread, and TMA replaces by zeros only what lies past the last key.
template <class Traits>
__device__ PackedTile without_unseen_keys(const ForwardParams& params, PackedTile tile) {
  using Keys = PackedKeys<Traits::kMask>;
  if (Keys::kHasBegin && tile.has_used_rows()) {
    const int first_seen = Keys{{tile.seq, params.window}, tile.rows}.begin(tile.m_begin);
    const int first = first_counted_key<Traits>(params.page, first_seen, tile.seq.seqlen_k);
    tile.seq.row_begin_k += first;
    tile.seq.seqlen_k -= first;
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

// Tiles of keys that a cluster's tile of queries visits, or a part of them; none where no row is in use.
template <class Traits>
__device__ KvRange visited_keys(const ForwardParams& params, const PackedTile& tile, int part) {
  if (!tile.has_used_rows()) return {};
  const PackedKeys<Traits::kMask> keys{{tile.seq, params.window}, tile.rows};
  const auto range = kv_range_of_rows<Traits::kClusterM, Traits::kTileN>(keys, tile.m_begin, tile.num_used_rows());
  return params.split.num_splits == 1 ? range : range.part(part, params.split.num_splits);
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
  KvRange own = kv_range_of_rows<Traits::kGroupRows, Traits::kTileN>(keys, m_begin, tile.num_used_rows());
  own.begin = max(own.begin, visited.begin);
  own.end = min(own.end, visited.end);
  if (m_begin >= tile.num_used_rows() || own.is_empty()) return {{}, max(visited.end - visited.begin, 0), 0};
  return {own, visited.end - own.end, own.begin - visited.begin};
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
  const int num_clusters = gridDim.x / Traits::kClusterBlocks;
  for (UnitCursor cursor(blockIdx.x / Traits::kClusterBlocks); cursor.unit() < order.num_units;
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

// What depends on the result stays in uniform registers. All lanes of the warp have read `id` when it returns, so that
// one of them may release it.
__device__ inline TileId read_by_warp(const TileId& id) {
  const TileId read = id;
  __syncwarp();
  return {__shfl_sync(~0u, read.entry, 0), __shfl_sync(~0u, read.first_head, 0), __shfl_sync(~0u, read.m_begin, 0),
          __shfl_sync(~0u, read.part, 0)};
}

// Calls `work(tile, id)` for each tile that the producer announces. `id` stays in shared memory, from where what is
// needed at the tile's end can be read again: kept, it would cost the loop registers.
template <class Traits, class Work>
__device__ void for_each_announced_tile(const ForwardParams& params, typename Traits::SharedStorage& smem,
                                        const Work& work) {
  StageCursor<Traits::kTileIdStages> cursor;
  for (;;) {
    wait_full(smem.barriers.tile_ids, cursor);
    const TileId& announced = smem.barriers.tile_id[cursor.idx];
    const TileId id = read_by_warp(announced);
    if (!id.exists()) break;
    work(without_unseen_keys<Traits>(params, packed_tile_of(params, id)), announced);
    __syncwarp();
    release(smem.barriers.tile_ids, cursor);
  }
}

}  // namespace flash_attn::sm90
