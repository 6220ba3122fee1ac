// Operands of the kernels that move tokens, and how they find a token's batch entry.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(FLASH_ATTN_EMULATED)
#include "kernels/common/bisection.h"
#endif

namespace flash_attn {

// A (batch, row, head, head_dim) tensor of any strides, in elements. Packed tensors have batch_stride 0; a paged
// cache's batch dimension counts pages.
struct TokenOperand {
  void* ptr;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
  int64_t column_stride;
};

// Tokens of a dense batch, `num_rows` of each entry, or of all entries together where cu_seqlens are given (int32,
// batch + 1 of them).
struct TokenLayout {
  int batch;
  int64_t num_rows;
  const int* cu_seqlens;

  int64_t num_tokens() const { return cu_seqlens == nullptr ? batch * num_rows : num_rows; }
};

// kVector moves pieces of 16 bytes: columns are contiguous, and strides, sizes and addresses multiples of that.
enum class TokenAccess { kVector, kScalar };

#if defined(__CUDACC__) || defined(FLASH_ATTN_EMULATED)

struct TokenCoord {
  int64_t source_batch_idx;  // 0 in a packed tensor
  int64_t source_row;
  int entry;    // -1: the token belongs to none
  int64_t row;  // within the entry
};

// The entry of a packed token by bisection. Whatever the metadata holds, nothing outside it is read.
__device__ inline TokenCoord locate_token(const TokenLayout& layout, int64_t token) {
  if (layout.cu_seqlens == nullptr) {
    const int64_t entry = token / layout.num_rows;
    const int64_t row = token % layout.num_rows;
    return {entry, row, static_cast<int>(entry), row};
  }
  const int entry = last_entry(layout.batch, [&](int entry) { return layout.cu_seqlens[entry] <= token; });
  const bool inside = entry < layout.batch && layout.cu_seqlens[entry] <= token && token < layout.cu_seqlens[entry + 1];
  return {0, token, inside ? entry : -1, inside ? token - layout.cu_seqlens[entry] : 0};
}

// One head of one token.
template <class Element>
struct TokenRow {
  Element* ptr;
  int64_t column_stride;

  __device__ Element* at(int column) const { return ptr + column * column_stride; }
};

template <class Element>
__device__ TokenRow<Element> row_of(const TokenOperand& operand, int64_t batch_idx, int64_t row, int head_idx) {
  return {static_cast<Element*>(operand.ptr) + batch_idx * operand.batch_stride + row * operand.row_stride +
              head_idx * operand.head_stride,
          operand.column_stride};
}

#endif

}  // namespace flash_attn
