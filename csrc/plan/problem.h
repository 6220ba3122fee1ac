// One validated attention call, in numbers alone: what the planner needs, for dense and variable-length batches alike.
#pragma once

#include <cstdint>

#include "variant/variant.h"

namespace flash_attn {

// kVarlen: the rows of all entries are packed, and their lengths are on the device.
enum class Layout { kDense, kVarlen };

// Whether the query heads that share a key-value head share tiles too.
enum class PackGqa { kAuto, kNever, kAlways };

struct Problem {
  Layout layout;    // of the queries
  Layout layout_k;  // of the keys: packed queries may go with dense ones
  Dtype dtype;
  int64_t batch;
  int64_t num_heads;
  int64_t num_heads_k;
  int head_dim;
  int head_dim_v;
  int64_t rows_q;  // kDense: query length of each entry; kVarlen: query rows of all entries together
  int64_t rows_k;  // likewise. With pages, the rows that those of an entry can hold
  bool has_pages;
  bool pages_suit_tma;  // SM90's kernels can take K and V out of them
  // Keys visible to the left and right of the diagonal; negative: all of them.
  int64_t window_left;
  int64_t window_right;
  bool has_softcap;
  bool has_alibi;
  bool has_dropout;
  int num_splits;  // of the keys; 0: to be chosen
  PackGqa pack_gqa;
  bool allows_few_rows;  // the planner may choose the kernels for few rows, which pack heads and split keys

  bool pages_need_sm80() const { return has_pages && !pages_suit_tma; }
  // Query heads that share a key-value head.
  int64_t num_heads_per_kv() const { return num_heads / num_heads_k; }
  // A dense batch has its own tiles per entry; the entries of a varlen batch share one run of tile slots.
  int64_t num_tile_runs() const { return layout == Layout::kDense ? batch : 1; }
  // With one split a row's bits may not depend on the other entries of a varlen batch: nor may the choice of a kernel.
  bool is_batch_invariant() const { return num_splits == 1 && layout == Layout::kVarlen; }
};

inline Score score_of(const Problem& problem) {
  return problem.has_softcap || problem.has_alibi || problem.has_dropout ? Score::kGeneral : Score::kPlain;
}

}  // namespace flash_attn
