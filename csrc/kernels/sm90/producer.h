// The producer's side: one thread that starts the copies of TMA.
#pragma once

#include "kernels/sm90/barriers.h"
#include "kernels/sm90/kv_source.h"
#include "kernels/sm90/row_box.h"
#include "kernels/sm90/tile_id.h"
#include "kernels/sm90/tile_order.h"
#include "kernels/sm90/visited_keys.h"

namespace flash_attn::sm90 {

// Announces each tile, loads its Q, and K and V in the order in which the consumers take them: the last tile of keys
// first, each K one step before the V that goes with the K before it.
template <class Traits, template <class> class KvSource>
class Producer {
 public:
  using Element = typename Traits::Element;

  __device__ Producer(const ForwardParams& params, const ForwardTensorMaps& maps, typename Traits::SharedStorage& smem)
      : params_(params), maps_(maps), smem_(smem) {}

  // All tiles of this block's cluster.
  __device__ void load_all(const TileOrder& order) {
    for_each_tile<Traits>(params_, order, [&](const TileId& id) { load(id); });
    announce(TileId::none());
  }

 private:
  // The cluster's tile, unless it has no rows.
  __device__ void load(const TileId& id) {
    const PackedTile all_rows = packed_tile_of(params_, id);
    if (!all_rows.has_rows()) return;
    announce(id);
    const PackedTile tile = without_unseen_keys<Traits>(params_, all_rows);
    const KvRange range = visited_keys<Traits>(params_, tile, id.part);
    const KvSource<Traits> source(params_, maps_, tile);
    // The first K before Q, whose space the last tile's O may still be leaving.
    if (!range.is_empty()) load_k(source, range.end - 1);
    load_q(tile_of_block<Traits>(tile));
    for (int n = range.end - 1; n >= range.begin; --n) {
      if (n > range.begin) load_k(source, n - 1);
      load_v(source, n);
    }
  }
  __device__ void announce(const TileId& id) {
    auto& tile_ids = smem_.barriers.tile_ids;
    wait_empty(tile_ids, tile_id_);
    smem_.barriers.tile_id[tile_id_.idx] = id;
    tile_ids.full[tile_id_.idx].arrive();
    tile_id_.advance();
  }
  __device__ void load_q(const PackedTile& tile) {
    using Box = RowBox<Traits::kTileM, Traits::template kBoxCols<Traits::kHeadDim>>;
    const Box box = Box::of_packed_rows(maps_.q, tile, 0);
    Mbarrier& barrier = acquire(smem_.barriers.q, q_, Traits::kQBytes);
    box.template load<Traits::kHeadDim>(CacheHint::EVICT_FIRST, barrier, smem_.q_or_o[q_.idx]);
    q_.advance();
  }
  __device__ void load_k(const KvSource<Traits>& source, int n_idx) {
    Element* tile = smem_.k[k_.idx / Traits::kKSlices];
    CUTE_UNROLL
    for (int slice = 0; slice < Traits::kKSlices; ++slice) {
      Mbarrier& barrier = acquire(smem_.barriers.k, k_, Traits::kKSliceBytes);
      source.load_k(n_idx, slice * Traits::kKSliceCols, barrier, tile);
      k_.advance();
    }
  }
  __device__ void load_v(const KvSource<Traits>& source, int n_idx) {
    CUTE_UNROLL
    for (int group = 0; group < Traits::kColumnGroups; ++group) {
      Mbarrier& barrier = acquire(smem_.barriers.v[group], v_, Traits::kVSliceBytes);
      source.load_v(n_idx, group * Traits::kGroupCols, barrier, smem_.v[v_.idx]);
    }
    v_.advance();
  }

  const ForwardParams& params_;
  const ForwardTensorMaps& maps_;
  typename Traits::SharedStorage& smem_;
  StageCursor<Traits::kTileIdStages> tile_id_;
  StageCursor<Traits::kQStages> q_;
  StageCursor<Traits::kKvStages * Traits::kKSlices> k_;
  StageCursor<Traits::kKvStages> v_;
};

}  // namespace flash_attn::sm90
