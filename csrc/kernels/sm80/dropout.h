// Dropout of the probabilities that a lane holds, by the random bytes of philox.h.
#pragma once

#include "kernels/common/philox.h"
#include "kernels/common/tensor.h"

namespace flash_attn::sm80 {

using namespace cute;

// Pairs of neighbouring columns that one draw serves of a row: those of four m16n8 accumulators side by side.
inline constexpr int kPairsOfDraw = 4;

// How many of them a lane holds side by side: all where a warp owns all columns, one where warps share them.
constexpr int dropout_pairs(int warps_n) { return warps_n > 1 ? 1 : kPairsOfDraw; }

// One draw serves the 16 probabilities that a lane holds of a 16 x 32 tile.
class DropoutMask {
 public:
  __device__ DropoutMask(const DropoutParams& dropout, int num_heads, int batch_idx, int head_idx)
      : stream_(dropout, num_heads, batch_idx, head_idx), threshold_(dropout.keep_threshold) {}

  // Zeroes what is dropped, kPairs pairs of columns at a time. `probs` and `coords` are (rows, columns) views.
  template <int kPairs, class Probs, class Coords>
  __device__ void apply(Probs&& probs, const Coords& coords, int m_begin, int n_begin) const {
    CUTE_UNROLL
    for (int row = 0; row < size<0>(probs); row += 2) {
      CUTE_UNROLL
      for (int col = 0; col < size<1>(probs); col += 2 * kPairs) {
        const unsigned i = m_begin + static_cast<int>(get<0>(coords(row, col)));
        const unsigned j = n_begin + static_cast<int>(get<1>(coords(row, col)));
        const uint4 words = stream_.draw(i, j);
        const int first_pair = kPairs == kPairsOfDraw ? 0 : j % 32 / 8;
        drop<kPairs>(probs, row, col, random_bytes(words.x, words.y, first_pair));
        drop<kPairs>(probs, row + 1, col, random_bytes(words.z, words.w, first_pair));
      }
    }
  }

 private:
  // The eight bytes of a row, from those of `first_pair` on.
  static __device__ unsigned long long random_bytes(unsigned low, unsigned high, int first_pair) {
    return (static_cast<unsigned long long>(high) << 32 | low) >> (16 * first_pair);
  }

  template <int kPairs, class Probs>
  __device__ void drop(Probs&& probs, int row, int col, unsigned long long bytes) const {
    CUTE_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) {
      const int random = static_cast<int>(bytes >> (8 * i)) & 0xFF;
      if (random > threshold_) probs(row, col + i) = 0.f;
    }
  }

  DropoutStream stream_;
  int threshold_;
};

}  // namespace flash_attn::sm80
