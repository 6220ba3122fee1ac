// Where a row lies. Of packed tensors, whose batch_stride is 0, `row` counts through all entries.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/params.h"

namespace flash_attn {

// The row's first element.
template <class Element>
__device__ Element* row_of(const Operand& operand, int batch_idx, int64_t row, int head_idx) {
  return static_cast<Element*>(operand.ptr) + batch_idx * operand.batch_stride + row * operand.row_stride +
         head_idx * operand.head_stride;
}

}  // namespace flash_attn
