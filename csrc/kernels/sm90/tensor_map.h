// Descriptors with which TMA moves boxes of rows between global and shared memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/common/params.h"
#include "variant/variant.h"

namespace flash_attn::sm90 {

// Boxes of (box_rows, box_heads, box_cols) of one batch entry, swizzled over the box's row of 64 or 128 bytes.
struct TensorMapSpec {
  Operand operand;
  int num_rows;
  int num_heads;
  int batch;
  int head_dim;
  int box_rows;
  int box_heads;
  int box_cols;
};

// A sequence's rows end anywhere within the tensor, and TMA must neither read nor write past them. The descriptor
// therefore has two dimensions of rows with the same stride: (head_dim, heads, box_rows, num_rows + 1, batch), on a
// base that lies box_rows rows before the tensor. The box of the `count` rows that start at `begin` is at (box_rows -
// count, begin + count) of the two: of its box_rows rows those past `count` lie outside the first dimension, so they
// are filled with zeros on a load and left out of a store.
cudaError_t encode_tensor_map(const TensorMapSpec& spec, Dtype dtype, CUtensorMap* map);

}  // namespace flash_attn::sm90
