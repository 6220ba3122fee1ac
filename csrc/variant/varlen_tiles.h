// How the query rows of a variable-length batch are cut into tiles without reading its lengths on the host.
//
// Entry b owns the tile slots [first_slot(b), first_slot(b + 1)) with first_slot(b) = cu_seqlens[b] / m + b: a closed
// form that grows with b, holds at least ceil(length / m) slots for each entry, and lets a thread block find its entry
// by bisection. Slots past the last entry cover rows that belong to no entry.
#pragma once

#include <cstdint>

namespace flash_attn {

constexpr int64_t first_varlen_slot(int64_t row_begin, int64_t entry, int tile_m) { return row_begin / tile_m + entry; }

// Slots of the whole batch; the one past the entries' own is what lets the unowned rows fit.
constexpr int64_t num_varlen_slots(int64_t total_rows, int64_t batch, int tile_m) {
  return first_varlen_slot(total_rows, batch, tile_m) + 1;
}

}  // namespace flash_attn
