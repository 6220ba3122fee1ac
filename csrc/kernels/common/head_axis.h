// The heads of all batch entries as one dimension of a TMA descriptor.
#pragma once

#include <cstdint>
#include <limits>
#include <numeric>

#include "kernels/common/params.h"

namespace flash_attn {

// Heads and entries lie whole numbers of steps apart. A dimension with stride 0 is broadcast, and takes no step.
struct HeadAxis {
  HeadAxis(const Operand& operand, int64_t num_heads, int64_t batch) {
    const int64_t head_stride = num_heads > 1 ? operand.head_stride : 0;
    const int64_t entry_stride = batch > 1 ? operand.batch_stride : 0;
    stride = std::gcd(head_stride, entry_stride);
    if (stride == 0) return;
    head_step = head_stride / stride;
    entry_step = entry_stride / stride;
    size += (num_heads - 1) * head_step + (batch - 1) * entry_step;
  }

  // Coordinates are int.
  bool can_be_counted() const { return size <= std::numeric_limits<int>::max(); }

  int64_t stride = 0;  // in elements
  int64_t head_step = 0;
  int64_t entry_step = 0;
  int64_t size = 1;
};

}  // namespace flash_attn
