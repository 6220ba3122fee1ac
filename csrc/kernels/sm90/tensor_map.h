// Descriptors with which TMA moves boxes of rows between global and shared memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/common/head_axis.h"
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

struct TensorMap {
  CUtensorMap descriptor;
  // From a head to the next one, and from an entry's to the same of the next entry, along the dimension of heads.
  int head_step;
  int entry_step;
};

inline constexpr int kRowBound = 1 << 30;

// A sequence's rows end anywhere within the tensor, and TMA must neither read nor write past them. The descriptor
// therefore has three dimensions of rows: one of kRowBound with the rows' stride, one of num_rows + 1 with the same,
// and one of kRowBound + 1 whose stride is 2^34 elements less that of the rows. The box of the `count` rows that start
// at `begin` is at (kRowBound - count, begin + count, kRowBound) of the three. Its address is that of row `begin`: the
// stride is added kRowBound - count + begin + count times and taken off kRowBound times, and kRowBound times 2^34
// elements is nothing in 64 bits of address. Of the box's rows those past `count` lie outside the first dimension, so
// they are filled with zeros on a load and left out of a store.
//
// The sizes are as tight as they can be, so that no address within them lies past the tensor. With looser ones TMA was
// seen to return the right zeros, and yet to read memory behind the tensor (pull request 201 of Dao-AILab/quack).
//
// The box from row `begin` on whose first `count` rows are filled with zeros is at (-count, begin + count, 0).
//
// Two dimensions would do on a base that lies kRowBound rows, or one box, before the tensor, where there may be no
// memory: stores accept that, loads are said not to (a comment in QuACK's copy_utils.py). The third is Triton's way
// (triton/tools/ragged_tma.py), which has run on Hopper.
cudaError_t encode_tensor_map(const TensorMapSpec& spec, Dtype dtype, TensorMap* map);

}  // namespace flash_attn::sm90
