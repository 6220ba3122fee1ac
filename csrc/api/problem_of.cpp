#include "api/problem_of.h"

#include <cmath>
#include <utility>

#include "api/params_of.h"
#include "variant/tiles.h"

// Whether the planner may choose the kernels for few rows and split keys in any call, as it may in a build for the
// emulator. No GPU has run them yet: where another kernel that one has run serves a call, that one does.
#ifndef FLASH_ATTN_FEW_ROWS
#define FLASH_ATTN_FEW_ROWS false
#endif

namespace flash_attn {
namespace {

void check_same_device_and_dtype(const ForwardArgs& args) {
  for (const auto& [name, tensor] : {std::pair{"k", &args.k}, std::pair{"v", &args.v}}) {
    check(tensor->device() == args.q.device(), name, " must be on q's device");
    check(tensor->scalar_type() == args.q.scalar_type(), name, " must have q's dtype");
  }
}

void check_lengths(const ForwardArgs& args, int64_t batch) {
  check(!args.cu_seqlens_k || args.cu_seqlens_q, "cu_seqlens_k goes with cu_seqlens_q");
  check(!args.cache_batch_idx || !args.cu_seqlens_k || args.block_table,
        "cache_batch_idx goes with a cache, not cu_seqlens_k");
  check_ints("cu_seqlens_q", args.cu_seqlens_q, args.q, batch + 1);
  check_ints("cu_seqlens_k", args.cu_seqlens_k, args.q, batch + 1);
  check_ints("seqused_q", args.seqused_q, args.q, batch);
  check_ints("seqused_k", args.seqused_k, args.q, batch);
  check_ints("leftpad_k", args.leftpad_k, args.q, batch);
  check_ints("cache_batch_idx", args.cache_batch_idx, args.q, batch);
  if (args.scheduler_metadata) {
    const int64_t size = args.scheduler_metadata->numel();
    check(size >= 1 + batch, "scheduler_metadata must hold at least ", 1 + batch, " elements, got ", size);
    check_ints("scheduler_metadata", args.scheduler_metadata, args.q, size);
  }
}

void check_block_table(const ForwardArgs& args, int64_t batch) {
  const Tensor& table = *args.block_table;
  check(table.device() == args.q.device(), "block_table must be on q's device");
  check(table.scalar_type() == ScalarType::Int, "block_table must be int32");
  check(table.dim() == 2, "block_table must have 2 dimensions, got ", shape_of(table));
  check(args.cache_batch_idx || table.size(0) == batch, "block_table must have ", batch, " rows, got ", table.size(0));
  check(table.size(1) <= 1 || table.stride(1) == 1, "block_table must have rows of stride 1");
  check(args.k.size(1) >= 1, "k must have pages of at least one row");
}

// Rows of K that an entry can have, or all entries together where they are packed.
int64_t rows_k_of(const ForwardArgs& args, bool packed_k) {
  if (!args.block_table) return args.k.size(packed_k ? 0 : 1);
  // Without a page there is no row, however long the table.
  if (args.k.size(0) == 0 || args.block_table->size(0) == 0) return 0;
  return args.block_table->size(1) * args.k.size(1);
}

// Entries of the batch; with cu_seqlens_q they are packed into q's rows.
int64_t batch_of(const ForwardArgs& args) {
  if (!args.cu_seqlens_q) return args.q.size(0);
  check(args.cu_seqlens_q->numel() >= 1, "cu_seqlens_q must hold at least one offset");
  return args.cu_seqlens_q->numel() - 1;
}

// A packed tensor is (row, head, head_dim), a dense one (batch, row, head, head_dim).
void check_rank(const char* name, const Tensor& tensor, bool packed) {
  check(tensor.dim() == (packed ? 3 : 4), name, " must have ", packed ? 3 : 4, " dimensions, got ", shape_of(tensor));
}

void check_score(const ForwardArgs& args, int64_t batch, int64_t num_heads) {
  check(std::isfinite(args.softmax_scale), "softmax_scale must be finite, got ", args.softmax_scale);
  check(std::isfinite(args.softcap) && args.softcap >= 0.0, "softcap must be at least 0, got ", args.softcap);
  check(args.dropout_p >= 0.0 && args.dropout_p < 1.0, "dropout_p must be in [0, 1), got ", args.dropout_p);
  check(args.dropout_p == 0.0 || args.rng_state.has_value(), "rng_state must be given with dropout_p");
  if (args.rng_state) {
    check(args.rng_state->device() == args.q.device(), "rng_state must be on q's device");
    check(args.rng_state->scalar_type() == ScalarType::Long, "rng_state must be int64");
    check(args.rng_state->is_contiguous(), "rng_state must be contiguous");
    check_shape("rng_state", *args.rng_state, {2});
  }
  if (args.s_aux) {
    check(args.s_aux->device() == args.q.device(), "s_aux must be on q's device");
    check_shape("s_aux", *args.s_aux, {num_heads});
  }
  if (args.alibi_slopes) {
    const Tensor& slopes = *args.alibi_slopes;
    check(slopes.device() == args.q.device(), "alibi_slopes must be on q's device");
    check(slopes.scalar_type() == ScalarType::Float, "alibi_slopes must be float32");
    if (slopes.dim() == 1) {
      check_shape("alibi_slopes", slopes, {num_heads});
    } else {
      check_shape("alibi_slopes", slopes, {batch, num_heads});
    }
    check(slopes.stride(slopes.dim() - 1) == 1 || num_heads == 1, "alibi_slopes must have stride 1 over heads");
  }
}

void check_num_splits(int64_t num_splits) {
  check(num_splits >= 0 && num_splits <= kMaxSplits, "num_splits must be in [0, ", kMaxSplits, "], got ", num_splits);
}

bool allows_few_rows(const ForwardArgs& args) {
  return FLASH_ATTN_FEW_ROWS || args.block_table || args.leftpad_k || args.cache_batch_idx || args.num_splits > 1;
}

// No cache is copied to suit TMA, nor one page's rows brought in parts that begin anywhere.
bool pages_suit_tma(const ForwardArgs& args) {
  if (!args.block_table || arch_of(args.arch) != Arch::kSm90 || args.leftpad_k) return false;
  return args.k.size(1) % kLeastPageBoxRows == 0 && can_be_operand(args.k, OperandRole::kKeys, Arch::kSm90) &&
         can_be_operand(args.v, OperandRole::kKeys, Arch::kSm90);
}

PackGqa pack_gqa_of(const std::optional<bool>& pack_gqa) {
  if (!pack_gqa) return PackGqa::kAuto;
  return *pack_gqa ? PackGqa::kAlways : PackGqa::kNever;
}

}  // namespace

Problem make_problem(const ForwardArgs& args) {
  const Tensor& q = args.q;
  check_same_device_and_dtype(args);
  const Dtype dtype = dtype_of(q);
  const bool packed_q = args.cu_seqlens_q.has_value();
  const bool packed_k = args.cu_seqlens_k && !args.block_table;
  check_rank("q", q, packed_q);
  check_rank("k", args.k, packed_k);
  check_rank("v", args.v, packed_k);
  const int64_t batch = batch_of(args);
  const int64_t rows_q = q.size(packed_q ? 0 : 1);
  if (args.block_table) check_block_table(args, batch);
  const int64_t rows_k = rows_k_of(args, packed_k);
  const int64_t num_heads = q.size(q.dim() - 2);
  const int64_t num_heads_k = args.k.size(args.k.dim() - 2);
  const int64_t head_dim = q.size(q.dim() - 1);
  const int64_t head_dim_v = args.v.size(args.v.dim() - 1);
  if (packed_k) {
    check_shape("k", args.k, {rows_k, num_heads_k, head_dim});
    check_shape("v", args.v, {rows_k, num_heads_k, head_dim_v});
  } else {
    const int64_t entries = args.block_table || args.cache_batch_idx ? args.k.size(0) : batch;
    check_shape("k", args.k, {entries, args.k.size(1), num_heads_k, head_dim});
    check_shape("v", args.v, {entries, args.k.size(1), num_heads_k, head_dim_v});
  }
  check_lengths(args, batch);
  check(num_heads > 0 && num_heads_k > 0 && num_heads % num_heads_k == 0, "q's heads must be a multiple of k's, got ",
        num_heads, " and ", num_heads_k);
  check(head_dim >= 1 && head_dim_v >= 1, "head_dim must be at least 1, got ", head_dim, " and ", head_dim_v);
  // A query's distance from a key, and the number of a page or of an entry of a cache, are int.
  check(rows_q + rows_k <= kMaxRows, "q and k have at most ", kMaxRows, " rows together, got ", rows_q, " and ",
        rows_k);
  check(args.k.size(0) <= kMaxRows, "k has at most ", kMaxRows, " entries or pages, got ", args.k.size(0));
  check_score(args, batch, num_heads);
  check_num_splits(args.num_splits);
  return {.layout = packed_q ? Layout::kVarlen : Layout::kDense,
          .layout_k = packed_k ? Layout::kVarlen : Layout::kDense,
          .dtype = dtype,
          .batch = batch,
          .num_heads = num_heads,
          .num_heads_k = num_heads_k,
          .head_dim = static_cast<int>(head_dim),
          .head_dim_v = static_cast<int>(head_dim_v),
          .rows_q = rows_q,
          .rows_k = args.cache_batch_idx && args.k.size(0) == 0 ? 0 : rows_k,
          .has_pages = args.block_table.has_value(),
          .pages_suit_tma = pages_suit_tma(args),
          .window_left = args.window_left,
          .window_right = args.window_right,
          .has_softcap = args.softcap > 0.0,
          .has_alibi = args.alibi_slopes.has_value(),
          .has_dropout = args.dropout_p > 0.0,
          .num_splits = static_cast<int>(args.num_splits),
          .pack_gqa = pack_gqa_of(args.pack_gqa),
          .allows_few_rows = allows_few_rows(args)};
}

}  // namespace flash_attn
