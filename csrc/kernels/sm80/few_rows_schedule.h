// Which tile of rows, and which part of its keys, a thread block of a kernel with few rows has. The host knows neither
// lengths nor how many splits they need: the grid has a fixed number of slots, and each thread block reads the lengths
// itself, which takes less time than a scheduling kernel before it.
#pragma once

#include <limits>

#include "kernels/common/kv_range.h"
#include "kernels/common/params.h"
#include "kernels/common/row_map.h"
#include "kernels/common/seq_info.h"
#include "variant/rounding.h"
#include "variant/tiles.h"

namespace flash_attn::sm80 {

// A tile of packed rows, and the part of its keys.
struct FewRowsTile : PackedTile {
  int split_idx;  // negative: the slot has no tile
  int num_splits;
  int64_t first_slot;  // of the entry
  int64_t place;       // of this slot among the entry's

  __device__ bool has_part() const { return split_idx >= 0 && split_idx < num_splits; }
  // One tile and part of each entry does.
  __device__ bool opens_entry() const { return place == 0 && split_idx == 0 && rows.first_head == 0; }
};

namespace detail {

inline constexpr unsigned kWholeWarp = ~0u;

// The slots of a batch entry, one after another: for each part of its keys, all of its tiles of rows.
struct SlotRun {
  int entry;
  int64_t first_slot;
  int num_splits;
};

__device__ inline int64_t warp_sum(int64_t value) {
#pragma unroll
  for (int distance = kThreadsPerWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// Sum over the lanes below.
__device__ inline int64_t warp_sum_before(int64_t value, int lane) {
  int64_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kThreadsPerWarp; distance *= 2) {
    const int64_t below = __shfl_up_sync(kWholeWarp, sum, distance);
    if (lane >= distance) sum += below;
  }
  return sum - value;
}

// Every entry has the same number of splits: closed forms.
template <int kTileM>
__device__ SlotRun find_fixed_run(const ForwardParams& params, int slot) {
  const SeqParams& seq = params.seq;
  const int packed_heads = params.split.packed_heads.divisor();
  const int num_splits = params.split.num_splits;
  if (seq.cu_seqlens_q == nullptr) {
    const int slots_per_entry = static_cast<int>(num_row_tiles(seq.rows_q, packed_heads, kTileM)) * num_splits;
    const int entry = slot / slots_per_entry;
    return {entry, static_cast<int64_t>(entry) * slots_per_entry, num_splits};
  }
  const int entry = entry_of_slot(seq.cu_seqlens_q, seq.batch, seq.rows_q, slot / num_splits, kTileM, packed_heads);
  const int64_t first_row = static_cast<int64_t>(row_at(seq.cu_seqlens_q, entry, seq.rows_q)) * packed_heads;
  return {entry, first_varlen_slot(first_row, entry, kTileM) * num_splits, num_splits};
}

// The work of an entry, in tiles.
struct EntryWork {
  int64_t row_tiles;
  int key_tiles;
};

template <int kTileM, int kTileN>
__device__ EntryWork work_of_entry(const ForwardParams& params, int entry) {
  const SeqInfo seq = entry_info(params.seq, entry);
  const int64_t row_tiles = num_row_tiles(seq.rows_q, params.split.packed_heads.divisor(), kTileM);
  if (seq.seqlen_q == 0 || seq.seqlen_k == 0) return {row_tiles, 0};
  const VisibleKeys<Mask::kGeneral> keys{seq, params.window};
  const int begin = keys.begin(0) / kTileN;
  const int end = ceil_div(max(keys.end(seq.seqlen_q - 1), 0), kTileN);
  return {row_tiles, max(end - begin, 0)};
}

__device__ inline int num_splits_of(const EntryWork& work, unsigned tiles_per_split) {
  const unsigned splits = ceil_div(work.key_tiles, tiles_per_split);
  return min(max(splits, 1u), static_cast<unsigned>(kMaxSplits));
}

// The batch entries that a lane looks at, one after another. Each warp goes through the whole batch on its own.
struct LaneEntries {
  int begin;
  int end;
};

__device__ inline LaneEntries entries_of_lane(int num_entries, int lane) {
  const int entries_per_lane = ceil_div(num_entries, kThreadsPerWarp);
  const int begin = min(lane * entries_per_lane, num_entries);
  return {begin, min(begin + entries_per_lane, num_entries)};
}

// How many longer parts are tried until all slots fit at once.
inline constexpr int kMaxTries = 3;

// The common length of parts, in tiles, and the slots that the lane's entries have with it.
struct PartLength {
  unsigned tiles;
  int64_t slots_of_lane;
};

// The length that cuts all `tiles` into about target_slots parts: the first of a few tried that needs no more slots
// than that, since one slot too many may cost as much time as all others; else the mean. Lengths past INT_MAX, which no
// entry has, serve as INT_MAX. flash_attn/_schedule.py does the same in torch.
template <class CountSlots>
__device__ PartLength find_part_length(const SplitParams& split, int64_t tiles, const CountSlots& count_slots) {
  constexpr int64_t kLongest = std::numeric_limits<int>::max();
  const int64_t target = split.target_slots;
  const auto with_slots = [&](int64_t length) {
    const auto short_length = static_cast<unsigned>(min(length, kLongest));
    return PartLength{short_length, count_slots(short_length)};
  };
  const int64_t mean = max(ceil_div(tiles, target), static_cast<int64_t>(split.min_tiles));
  int64_t length = mean;
  for (int i = 0; i <= kMaxTries; ++i) {
    const PartLength tried = with_slots(length);
    const int64_t slots = warp_sum(tried.slots_of_lane);
    if (slots <= target) return tried;
    length = ceil_div(length * slots, target);
  }
  return with_slots(mean);
}

// Each entry's keys are cut into parts of one common length, so that all thread blocks have about as much to do.
template <int kTileM, int kTileN>
__device__ SlotRun find_run_by_lengths(const ForwardParams& params, int slot) {
  const SeqParams& seq = params.seq;
  // Packed rows past the last entry belong to entry `batch`, which has no keys.
  const int num_entries = seq.batch + (seq.cu_seqlens_q == nullptr ? 0 : 1);
  const int lane = threadIdx.x % kThreadsPerWarp;
  const LaneEntries own = entries_of_lane(num_entries, lane);
  // A lane seldom has more than one entry, which is then read once.
  const EntryWork first = own.begin < own.end ? work_of_entry<kTileM, kTileN>(params, own.begin) : EntryWork{};
  const auto work_of = [&](int entry) {
    return entry == own.begin ? first : work_of_entry<kTileM, kTileN>(params, entry);
  };

  int64_t tiles = 0;
  for (int entry = own.begin; entry < own.end; ++entry) {
    const EntryWork work = work_of(entry);
    tiles += work.row_tiles * work.key_tiles;
  }
  const auto count_slots = [&](unsigned tiles_per_split) {
    int64_t slots = 0;
    for (int entry = own.begin; entry < own.end; ++entry) {
      const EntryWork work = work_of(entry);
      slots += work.row_tiles * num_splits_of(work, tiles_per_split);
    }
    return slots;
  };
  const PartLength part = find_part_length(params.split, warp_sum(tiles), count_slots);
  int64_t first_slot = warp_sum_before(part.slots_of_lane, lane);
  const bool is_here = slot >= first_slot && slot < first_slot + part.slots_of_lane;
  const unsigned holders = __ballot_sync(kWholeWarp, is_here);
  if (holders == 0) return {num_entries, 0, 0};
  SlotRun run{own.begin, first_slot, 0};
  if (is_here) {
    for (int entry = own.begin; entry < own.end; ++entry) {
      const EntryWork work = work_of(entry);
      const int num_splits = num_splits_of(work, part.tiles);
      run = {entry, first_slot, num_splits};
      first_slot += work.row_tiles * num_splits;
      if (slot < first_slot) break;
    }
  }
  const int holder = __ffs(holders) - 1;
  return {__shfl_sync(kWholeWarp, run.entry, holder), __shfl_sync(kWholeWarp, run.first_slot, holder),
          __shfl_sync(kWholeWarp, run.num_splits, holder)};
}

}  // namespace detail

// Decodes a block index. Indices run through heads first, whose keys lie side by side, then through slots.
template <int kTileM, int kTileN>
__device__ FewRowsTile locate_few_rows_tile(const ForwardParams& params, int block_idx) {
  const SplitParams& split = params.split;
  const int packed_heads = split.packed_heads.divisor();
  const int num_head_runs = params.heads.num_heads / packed_heads;
  const int head_run = block_idx % num_head_runs;
  const int slot = block_idx / num_head_runs;
  const detail::SlotRun run = split.num_splits > 0 ? detail::find_fixed_run<kTileM>(params, slot)
                                                   : detail::find_run_by_lengths<kTileM, kTileN>(params, slot);
  FewRowsTile tile{{.seq = {}, .rows = {head_run * packed_heads, split.packed_heads}, .m_begin = 0},
                   -1,
                   run.num_splits,
                   run.first_slot,
                   slot - run.first_slot};
  if (tile.place < 0 || run.num_splits == 0) return tile;
  tile.seq = entry_info(params.seq, run.entry);
  // Nothing is to be merged in rows of no entry, whatever the number of splits.
  if (run.entry == params.seq.batch) tile.num_splits = 1;
  const int64_t row_tiles = num_row_tiles(tile.seq.rows_q, packed_heads, kTileM);
  if (row_tiles == 0) return tile;
  tile.split_idx = static_cast<int>(tile.place / row_tiles);
  tile.m_begin = static_cast<int>(tile.place % row_tiles) * kTileM;
  return tile;
}

}  // namespace flash_attn::sm80
