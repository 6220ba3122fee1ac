// The random bytes of dropout. They depend on seed, offset, batch entry, head, row and column alone, so that every
// kernel, and the CPU path, draws the same.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/params.h"

namespace flash_attn {

namespace detail {

// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC'11).
__device__ inline uint4 philox(uint4 counter, uint2 key) {
  constexpr unsigned kMultiplier0 = 0xD2511F53;
  constexpr unsigned kMultiplier1 = 0xCD9E8D57;
  constexpr unsigned kKeyStep0 = 0x9E3779B9;
  constexpr unsigned kKeyStep1 = 0xBB67AE85;
  constexpr int kRounds = 10;
#pragma unroll
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

// The bytes of one head of one batch entry.
class DropoutStream {
 public:
  __device__ DropoutStream(const DropoutParams& dropout, int num_heads, int batch_idx, int head_idx) {
    const unsigned long long seed = dropout.rng_state[0];
    key_ = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
    offset_ = static_cast<unsigned>(dropout.rng_state[1]);
    head_ = static_cast<unsigned>(batch_idx) * num_heads + head_idx;
  }

  // The draw that row i and column j take part in. It serves 16 probabilities of a 16 x 32 tile: two rows 8 apart (x
  // and y, z and w), four pairs of columns 8 apart.
  __device__ uint4 draw(unsigned i, unsigned j) const {
    return detail::philox({j / 32 * 4 + j % 8 / 2, i / 16 * 8 + i % 8, head_, offset_}, key_);
  }

  __device__ int byte_of(unsigned i, unsigned j) const {
    const uint4 words = draw(i, j);
    const bool upper = i % 16 < 8;
    const unsigned long long low = upper ? words.x : words.z;
    const unsigned long long high = upper ? words.y : words.w;
    return static_cast<int>((high << 32 | low) >> (8 * (j % 32 / 8 * 2 + j % 2))) & 0xFF;
  }

 private:
  uint2 key_;
  unsigned offset_;
  unsigned head_;
};

}  // namespace flash_attn
