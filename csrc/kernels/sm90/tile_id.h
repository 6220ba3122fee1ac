// What the producer tells the consumers about the tile that comes next.
#pragma once

#include "kernels/common/row_map.h"
#include "kernels/common/seq_info.h"

namespace flash_attn::sm90 {

// Where a tile of packed rows lies, and which part of its keys is meant.
struct TileId {
  int entry;
  int first_head;
  int m_begin;  // first packed row within the entry
  int part;

  // There are no more tiles.
  static __device__ TileId none() { return {-1, 0, 0, 0}; }
  __device__ bool exists() const { return entry >= 0; }
};

__device__ inline PackedTile packed_tile_of(const ForwardParams& params, const TileId& id) {
  return {entry_info(params.seq, id.entry), {id.first_head, params.split.packed_heads}, id.m_begin};
}

}  // namespace flash_attn::sm90
