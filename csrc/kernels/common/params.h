// What a forward launch is told, for every kernel. Strides are in elements.
#pragma once

#include <cstdint>

namespace flash_attn {

// A (batch, row, head, head_dim) tensor whose last dimension is contiguous. Variable-length tensors have no batch
// dimension: batch_stride is 0 and cu_seqlens gives each entry's first row.
struct Operand {
  void* ptr;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

// Log-sum-exp of each (batch, head, row), natural log, float32, rows contiguous.
struct LseOperand {
  float* ptr;
  int64_t batch_stride;
  int64_t head_stride;
};

struct HeadParams {
  int num_heads;
  int num_heads_per_kv;  // query heads that share one key-value head
  int head_dim;
  int head_dim_v;
};

// Lengths of a dense batch, or of all entries together where cu_seqlens are given (int32, batch + 1 of them).
struct SeqParams {
  int batch;
  int rows_q;
  int rows_k;
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
};

// Scores are multiplied by `factor` first and by `softmax_scale`, which is positive, within the softmax.
struct ScoreParams {
  float factor;
  float softmax_scale;
};

struct ForwardParams {
  Operand q;
  Operand k;
  Operand v;
  Operand o;
  LseOperand lse;
  HeadParams heads;
  SeqParams seq;
  int tiles_per_head;
  ScoreParams score;
};

}  // namespace flash_attn
