// The parameters of a forward launch, the same for all kernels. Strides are in elements.
#pragma once

#include <cstdint>

#include "kernels/common/fast_divisor.h"

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

// How many rows the entries of a batch have. cu_seqlens (int32, batch + 1 of them) are null where a tensor has a batch
// dimension. seqused are the lengths in use of each entry's rows (int32, batch of them), or null for all.
struct SeqParams {
  int batch;
  int rows_q;  // of each entry, or of all together where cu_seqlens are given
  int rows_k;  // likewise
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
  const int* seqused_q;
  const int* seqused_k;
  const int* leftpad_k;  // keys at each entry's start that it leaves out (int32, batch of them), or null
  // Row of K's batch dimension, or of the page table, that each entry uses (int32, batch of them), or null for its own.
  const int* cache_batch_idx;
  int num_cache_rows;  // of K's batch dimension, or of the page table
  // K and V lie in pages: rows_k is what an entry's pages hold, and cu_seqlens_k gives lengths only.
  bool has_pages;

  // Otherwise all entries have rows_q and rows_k of them, as the host knows, too.
  bool has_lengths() const { return cu_seqlens_q != nullptr || seqused_q != nullptr || seqused_k != nullptr; }
};

// Key t of an entry is row t % page_size of page table[t / page_size]: K's and V's batch dimension counts pages. Null
// table: no pages. Of SM80's kernels those with Mask::kGeneral read it.
struct PageParams {
  const int* table;  // (rows, pages of each)
  int64_t table_stride;
  FastDivisor page_size;
  int num_pages;  // of K and V
};

// Keys visible to the left and right of the diagonal, at most rows_k and rows_q. Kernels with Mask::kGeneral read it.
struct WindowParams {
  int left;
  int right;
};

// Scores are multiplied by `score_factor` first, and by `softmax_scale`, which is positive, within the softmax
// (score.h).
struct ScoreParams {
  float score_factor;
  float softmax_scale;
  // Score::kGeneral. With softcap, `score_factor` is softmax_scale / softcap and `softmax_scale` is softcap.
  bool has_softcap;
  const float* alibi_slopes;  // (batch or 1, head), or null
  int64_t alibi_batch_stride;
};

// Attention sinks: a score for each head that joins the softmax's denominator. Null: none.
struct SinkParams {
  const float* scores;
};

// Score::kGeneral. A probability is kept if its random byte is at most `keep_threshold`; null rng_state: all are kept.
struct DropoutParams {
  const int64_t* rng_state;  // seed, offset
  int keep_threshold;
  float rescale;  // 1 / (1 - p)
};

// How tiles of rows and of keys are shared out. A tile's rows are the queries of `packed_heads` neighbouring heads: of
// 1 in SM80's kernels for many rows. SM80's kernels with the general mask and SM90's may split keys: a slot is then a
// tile of rows and one part of the keys that it sees, and a kernel of its own merges the parts.
struct SplitParams {
  FastDivisor packed_heads;
  int num_slots;
  int num_splits;  // of each tile's keys; 0, for few rows only: thread blocks derive it from the lengths of each entry
  // With num_splits 0: about target_slots slots have keys, no more if possible, and each at least min_tiles tiles of
  // them.
  int target_slots;
  int min_tiles;
  // Each slot and run of packed heads has O (tile rows, head_dim_v) and LSE (tile rows). Null if nothing is split.
  float* o;
  float* lse;
  struct Entry {
    int first_slot;
    int num_splits;
  };
  Entry* entries;  // where the parts of each batch entry are
};

struct ForwardParams {
  Operand q;
  Operand k;
  Operand v;
  Operand o;
  LseOperand lse;
  HeadParams heads;
  SeqParams seq;
  PageParams page;
  int tiles_per_head;
  WindowParams window;
  ScoreParams score;
  SinkParams sink;
  DropoutParams dropout;
  SplitParams split;
};

}  // namespace flash_attn
