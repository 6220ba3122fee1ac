// Dropout of probabilities by a mask that depends on seed, offset, batch entry, head, row and column alone, so that
// every kernel, and the CPU path, draws the same.
#pragma once

#include "kernels/common/philox.h"
#include "kernels/common/tensor.h"

namespace flash_attn {

using namespace cute;

// One draw serves the 16 probabilities that a lane holds of a 16 x 32 tile.
class DropoutMask {
 public:
  __device__ DropoutMask(const DropoutParams& dropout, int num_heads, int batch_idx, int head_idx)
      : stream_(dropout, num_heads, batch_idx, head_idx), threshold_(dropout.keep_threshold) {}

  // Zeroes what is dropped. `probs` and `coords` are (rows, columns) views. A warp that owns all columns finds kPairs =
  // 4 pairs of columns of one draw side by side; one that shares them with others finds one.
  template <int kPairs, class Probs, class Coords>
  __device__ void apply(Probs&& probs, const Coords& coords, int m_begin, int n_begin) const {
    CUTE_UNROLL
    for (int row = 0; row < size<0>(probs); row += 2) {
      CUTE_UNROLL
      for (int col = 0; col < size<1>(probs); col += 2 * kPairs) {
        const unsigned i = m_begin + static_cast<int>(get<0>(coords(row, col)));
        const unsigned j = n_begin + static_cast<int>(get<1>(coords(row, col)));
        const uint4 words = stream_.draw(i, j);
        const int first_pair = kPairs == 4 ? 0 : j % 32 / 8;
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

}  // namespace flash_attn
