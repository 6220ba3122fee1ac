// What the kernels with one thread block per token share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels/misc/elements.h"
#include "kernels/misc/tokens.h"
#include "variant/tiles.h"

namespace flash_attn {

inline constexpr int kTokenThreads = 128;

// Calls `move(head_idx, column)` for each piece of kColumns columns of a token, spread over the thread block.
template <int kColumns, class Move>
__device__ void for_each_piece(int num_heads, int head_dim, const Move& move) {
  const int pieces_per_head = head_dim / kColumns;
  for (int idx = threadIdx.x; idx < num_heads * pieces_per_head; idx += kTokenThreads) {
    move(idx / pieces_per_head, idx % pieces_per_head * kColumns);
  }
}

// Calls `launch(element, columns, num_blocks)` with the types that a kernel for these tokens is made from.
template <class Launch>
cudaError_t launch_over_tokens(int64_t num_tokens, Dtype dtype, TokenAccess access, const Launch& launch) {
  if (num_tokens == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  const int num_blocks = static_cast<int>(std::min(num_tokens, kMaxBlocks));
  const auto with_columns = [&](auto element) {
    if (access == TokenAccess::kVector) {
      launch(element, std::integral_constant<int, kVectorElements>{}, num_blocks);
    } else {
      launch(element, std::integral_constant<int, 1>{}, num_blocks);
    }
  };
  if (dtype == Dtype::kFp16) {
    with_columns(__half{});
  } else {
    with_columns(__nv_bfloat16{});
  }
  return cudaGetLastError();
}

}  // namespace flash_attn
