// Dropout of probabilities by a mask that depends on seed, offset, batch entry, head, row and column alone, so that
// every kernel, and the CPU path, draws the same.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/params.h"
#include "kernels/common/seq_info.h"

namespace flash_attn {

using namespace cute;

namespace detail {

// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC'11).
__device__ inline uint4 philox(uint4 counter, uint2 key) {
  constexpr unsigned kMultiplier0 = 0xD2511F53;
  constexpr unsigned kMultiplier1 = 0xCD9E8D57;
  constexpr unsigned kKeyStep0 = 0x9E3779B9;
  constexpr unsigned kKeyStep1 = 0xBB67AE85;
  constexpr int kRounds = 10;
  CUTE_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const unsigned high0 = __umulhi(kMultiplier0, counter.x);
    const unsigned high1 = __umulhi(kMultiplier1, counter.z);
    counter = {high1 ^ counter.y ^ key.x, kMultiplier1 * counter.z, high0 ^ counter.w ^ key.y,
               kMultiplier0 * counter.x};
    key.x += kKeyStep0;
    key.y += kKeyStep1;
  }
  return counter;
}

}  // namespace detail

// One draw serves the 16 probabilities that a lane holds of a 16 x 32 tile: two rows 8 apart, four pairs of columns.
class DropoutMask {
 public:
  static constexpr int kTileCols = 32;
  static constexpr int kTileRows = 16;
  static constexpr int kColsPerDraw = 8;

  __device__ DropoutMask(const ForwardParams& params, const TileCoord& tile)
      : threshold_(params.dropout.keep_threshold) {
    const unsigned long long seed = params.dropout.rng_state[0];
    key_ = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
    offset_ = static_cast<unsigned>(params.dropout.rng_state[1]);
    head_ = static_cast<unsigned>(tile.seq.batch_idx) * params.heads.num_heads + tile.head_idx;
  }

  // Zeroes what is dropped. `probs` and `coords` are (rows, columns) views, columns of a lane 8 apart in pairs.
  template <class Probs, class Coords>
  __device__ void apply(Probs&& probs, const Coords& coords, int m_begin, int n_begin) const {
    CUTE_UNROLL
    for (int row = 0; row < size<0>(probs); row += 2) {
      CUTE_UNROLL
      for (int col = 0; col < size<1>(probs); col += kColsPerDraw) {
        const unsigned i = m_begin + static_cast<int>(get<0>(coords(row, col)));
        const unsigned j = n_begin + static_cast<int>(get<1>(coords(row, col)));
        const uint4 words =
            detail::philox({j / kTileCols * 4 + j % 8 / 2, i / kTileRows * 8 + i % 8, head_, offset_}, key_);
        drop<0>(probs, row, col, words.x, words.y);
        drop<1>(probs, row, col, words.z, words.w);
      }
    }
  }

 private:
  template <int kRow, class Probs>
  __device__ void drop(Probs&& probs, int row, int col, unsigned low, unsigned high) const {
    CUTE_UNROLL
    for (int byte = 0; byte < kColsPerDraw; ++byte) {
      const unsigned word = byte < 4 ? low : high;
      const int random = word >> (byte % 4 * 8) & 0xFF;
      if (random > threshold_) probs(row + kRow, col + byte) = 0.f;
    }
  }

  uint2 key_;
  unsigned offset_;
  unsigned head_;
  int threshold_;
};

}  // namespace flash_attn
