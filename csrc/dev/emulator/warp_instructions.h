// The instructions that a warp's lanes execute together, on values that they hold in registers.
#pragma once

#include <cstdint>

#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {

// What lane `from` of the warp shows.
template <class T>
T show(unsigned lanes, T value, int from) {
  struct Exchange {
    T own;
    T other;
    int from;
  } exchange{value, value, from};
  if ((lanes >> from & 1) == 0) fail("a shuffle from a lane that isn't in its mask");
  meet_with(lanes, exchange, [](unsigned lanes, auto lane_of) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) lane_of(lane).other = lane_of(lane_of(lane).from).own;
    }
  });
  return exchange.other;
}

// The lanes that vote for it.
inline unsigned ballot(unsigned lanes, bool vote) {
  struct Vote {
    bool own;
    unsigned all;
  } own{vote, 0};
  meet_with(lanes, own, [](unsigned lanes, auto lane_of) {
    unsigned all = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) all |= unsigned{lane_of(lane).own} << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) lane_of(lane).all = all;
    }
  });
  return own.all;
}

enum class MatrixOrder { kRows, kTransposed };

// What a lane brings to mma.m16n8k16, and takes from it.
struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
  float sums[4];
};

// Element is cutlass::half_t or cutlass::bfloat16_t.
template <class Element>
void multiply_matrices(MmaOperands& own);

// ldmatrix of four 8 x 8 matrices of 16-bit elements: `row` is the address of one of the 32 rows.
template <MatrixOrder kOrder>
void load_matrices(const void* row, uint32_t (&own)[4]);

// stmatrix, the reverse by rows.
void store_matrices(const uint32_t (&own)[4], void* row);

}  // namespace flash_attn::emulator
