// Which keys a tile of query rows visits, and which of those a consumer group's rows see.
#pragma once

#include "kernels/common/kv_range.h"
#include "kernels/common/row_map.h"
#include "variant/tiles.h"

namespace flash_attn::sm90 {

// The key from which a tile's steps are counted: `first_seen`, the first key that any of its rows sees; with pages, the
// start of that key's box, since a box must start at a multiple of its rows. TMA can zero only one end of a box, so a
// tile's only box starts at `first_seen`.
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

// The keys of the group whose rows are those of `tile` from `group_row` on. A group without rows in use sees nothing,
// and one in the upper part of a tile less than the others where a mask has edges.
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

}  // namespace flash_attn::sm90
