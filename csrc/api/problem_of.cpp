#include "api/problem_of.h"

#include <cmath>
#include <limits>

namespace flash_attn {
namespace {

void check_same_device_and_dtype(const ForwardArgs& args) {
  for (const auto& [name, tensor] : {std::pair{"k", &args.k}, std::pair{"v", &args.v}}) {
    check(tensor->device() == args.q.device(), name, " must be on q's device");
    check(tensor->scalar_type() == args.q.scalar_type(), name, " must have q's dtype");
  }
}

void check_cu_seqlens(const char* name, const std::optional<Tensor>& cu_seqlens, const Tensor& q, int64_t size) {
  check(cu_seqlens.has_value(), name, " must be given when q is (total, num_heads, head_dim)");
  check(cu_seqlens->device() == q.device(), name, " must be on q's device");
  check(cu_seqlens->scalar_type() == ScalarType::Int, name, " must be int32");
  check(cu_seqlens->dim() == 1 && cu_seqlens->is_contiguous(), name, " must be one contiguous dimension");
  check(cu_seqlens->size(0) == size, name, " must hold ", size, " offsets, got ", cu_seqlens->size(0));
}

// What no kernel has yet. _dispatch sends no such call here.
void check_plain(const ForwardArgs& args) {
  check(!args.s_aux, "s_aux: no kernel has attention sinks yet");
  check(!args.alibi_slopes, "alibi_slopes: no kernel has ALiBi yet");
  check(!args.rng_state && args.dropout_p == 0.0, "dropout_p: no kernel has dropout yet");
  check(!args.seqused_q, "seqused_q: no kernel takes it yet");
  check(!args.seqused_k, "seqused_k: no kernel takes it yet");
  check(!args.leftpad_k, "leftpad_k: no kernel takes it yet");
  check(!args.block_table, "block_table: no kernel has paged KV yet");
  check(!args.cache_batch_idx, "cache_batch_idx: no kernel takes it yet");
  check(args.softcap == 0.0, "softcap: no kernel has it yet");
  check(args.num_splits <= 1, "num_splits: no kernel splits keys yet, got ", args.num_splits);
}

}  // namespace

Problem make_problem(const ForwardArgs& args) {
  const Tensor& q = args.q;
  check_same_device_and_dtype(args);
  const Dtype dtype = dtype_of(q);
  const Layout layout = args.cu_seqlens_q ? Layout::kVarlen : Layout::kDense;
  const int64_t rank = layout == Layout::kDense ? 4 : 3;
  check(q.dim() == rank && args.k.dim() == rank && args.v.dim() == rank, "q, k and v must have ", rank,
        " dimensions, got ", shape_of(q), ", ", shape_of(args.k), ", ", shape_of(args.v));
  const int64_t row_dim = rank - 3;
  const int64_t rows_k = args.k.size(row_dim);
  const int64_t num_heads = q.size(rank - 2);
  const int64_t num_heads_k = args.k.size(rank - 2);
  const int64_t head_dim = q.size(rank - 1);
  const int64_t head_dim_v = args.v.size(rank - 1);
  int64_t batch = q.size(0);
  if (layout == Layout::kVarlen) {
    batch = args.cu_seqlens_q->dim() == 1 ? args.cu_seqlens_q->size(0) - 1 : 0;
    check(batch >= 1, "cu_seqlens_q must hold at least two offsets");
    check_cu_seqlens("cu_seqlens_q", args.cu_seqlens_q, q, batch + 1);
    check_cu_seqlens("cu_seqlens_k", args.cu_seqlens_k, q, batch + 1);
    check_shape("k", args.k, {rows_k, num_heads_k, head_dim});
    check_shape("v", args.v, {rows_k, num_heads_k, head_dim_v});
  } else {
    check(!args.cu_seqlens_k, "cu_seqlens_k goes with cu_seqlens_q");
    check_shape("k", args.k, {batch, rows_k, num_heads_k, head_dim});
    check_shape("v", args.v, {batch, rows_k, num_heads_k, head_dim_v});
  }
  check(num_heads_k > 0 && num_heads % num_heads_k == 0, "q's heads must be a multiple of k's, got ", num_heads,
        " and ", num_heads_k);
  check(head_dim >= 1 && head_dim_v >= 1, "head_dim must be at least 1, got ", head_dim, " and ", head_dim_v);
  constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
  check(q.size(row_dim) <= kMaxRows && rows_k <= kMaxRows, "a sequence has at most ", kMaxRows, " rows");
  check(std::isfinite(args.softmax_scale), "softmax_scale must be finite, got ", args.softmax_scale);
  check_plain(args);
  return {.layout = layout,
          .dtype = dtype,
          .batch = batch,
          .num_heads = num_heads,
          .num_heads_k = num_heads_k,
          .head_dim = static_cast<int>(head_dim),
          .head_dim_v = static_cast<int>(head_dim_v),
          .rows_q = q.size(row_dim),
          .rows_k = rows_k,
          .window_left = args.window_left,
          .window_right = args.window_right};
}

}  // namespace flash_attn
