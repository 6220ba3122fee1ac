#include "api/kvcache.h"

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <limits>

#include "api/cuda_error.h"
#include "api/cuda_stream.h"
#include "kernels/misc/append_kv.h"
#include "kernels/misc/rotary.h"

namespace flash_attn {
namespace {

// Dense (batch, row, head, head_dim) or packed (row, head, head_dim).
TokenOperand token_operand_of(const Tensor& tensor) {
  const bool dense = tensor.dim() == 4;
  const int64_t row_dim = dense ? 1 : 0;
  return {.ptr = tensor.data_ptr(),
          .batch_stride = dense ? tensor.stride(0) : 0,
          .row_stride = tensor.stride(row_dim),
          .head_stride = tensor.stride(row_dim + 1),
          .column_stride = tensor.stride(row_dim + 2)};
}

TokenLayout token_layout_of(const Tensor& tensor, int64_t batch, const std::optional<Tensor>& cu_seqlens) {
  return {.batch = static_cast<int>(batch),
          .num_rows = tensor.size(cu_seqlens ? 0 : 1),
          .cu_seqlens = int_pointer(cu_seqlens)};
}

TokenAccess token_access_of(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (!has_vector_rows(*tensor)) return TokenAccess::kScalar;
  }
  return TokenAccess::kVector;
}

void check_batch(int64_t batch) {
  constexpr int64_t kMaxBatch = std::numeric_limits<int32_t>::max() - 1;
  check(batch <= kMaxBatch, "a batch has at most ", kMaxBatch, " entries, got ", batch);
}

// The tables, with contiguous rows; held until the launch.
struct RotaryTables {
  Tensor cos;
  Tensor sin;

  RotaryTables(const Tensor& cos, const Tensor& sin, const Tensor& like, int64_t head_dim)
      : cos(with_contiguous_rows(cos)), sin(with_contiguous_rows(sin)) {
    check_like("rotary_cos", cos, like, like.scalar_type());
    check_like("rotary_sin", sin, like, like.scalar_type());
    check(cos.dim() == 2, "rotary_cos must have 2 dimensions, got ", shape_of(cos));
    check_shape("rotary_sin", sin, {cos.size(0), cos.size(1)});
    constexpr int64_t kRotaryDimMultiple = 16;
    const int64_t rotary_dim = 2 * cos.size(1);
    check(rotary_dim > 0 && rotary_dim % kRotaryDimMultiple == 0 && rotary_dim <= head_dim,
          "rotary_cos must have rotary_dim / 2 columns, rotary_dim a multiple of ", kRotaryDimMultiple,
          " up to head_dim ", head_dim, ", got rotary_dim ", rotary_dim);
  }

  RotaryParams params(bool interleaved) const {
    return {.cos = cos.const_data_ptr(),
            .sin = sin.const_data_ptr(),
            .cos_stride = cos.stride(0),
            .sin_stride = sin.stride(0),
            .num_positions = cos.size(0),
            .half_dim = static_cast<int>(cos.size(1)),
            .pairs = interleaved ? RotaryPairs::kNeighbours : RotaryPairs::kHalves};
  }

 private:
  static Tensor with_contiguous_rows(const Tensor& table) {
    const bool contiguous = table.dim() == 2 && (table.stride(1) == 1 || table.size(1) == 1);
    return contiguous ? table : torch::stable::contiguous(table);
  }
};

CachePlaces cache_places_of(const Tensor& k_cache, const Tensor& cache_seqlens,
                            const std::optional<Tensor>& cache_batch_idx, const std::optional<Tensor>& block_table) {
  const int64_t batch = cache_seqlens.numel();
  check_ints("cache_seqlens", cache_seqlens, k_cache, batch);
  check_ints("cache_batch_idx", cache_batch_idx, k_cache, batch);
  CachePlaces places{.cache_seqlens = int_pointer(cache_seqlens),
                     .cache_batch_idx = int_pointer(cache_batch_idx),
                     .block_table = int_pointer(block_table),
                     .has_pages = block_table.has_value(),
                     .num_pages = k_cache.size(0),
                     .page_size = k_cache.size(1)};
  if (block_table) {
    check_like("block_table", *block_table, k_cache, ScalarType::Int);
    check(block_table->dim() == 2, "block_table must have 2 dimensions, got ", shape_of(*block_table));
    check(block_table->size(1) <= 1 || block_table->stride(1) == 1, "block_table must have rows of stride 1");
    places.table_stride = block_table->stride(0);
    places.num_table_rows = block_table->size(0);
    places.pages_per_row = block_table->size(1);
  }
  const int64_t num_rows = block_table ? places.num_table_rows : places.num_pages;
  check(cache_batch_idx || num_rows == batch, block_table ? "block_table" : "k_cache",
        " must have one row for each of the ", batch, " batch entries, got ", num_rows);
  return places;
}

// The new tokens, which the caches must be able to take.
void check_tokens(const char* name, const Tensor& tokens, const char* cache_name, const Tensor& cache,
                  const Tensor& k_cache, int64_t batch, const std::optional<Tensor>& cu_seqlens) {
  check_like(cache_name, cache, k_cache, k_cache.scalar_type());
  check(cache.dim() == 4, cache_name, " must have 4 dimensions, got ", shape_of(cache));
  check_shape(cache_name, cache, {k_cache.size(0), k_cache.size(1), k_cache.size(2), cache.size(3)});
  check_like(name, tokens, k_cache, k_cache.scalar_type());
  const int64_t rank = cu_seqlens ? 3 : 4;
  check(tokens.dim() == rank, name, " must have ", rank, " dimensions, got ", shape_of(tokens));
  if (cu_seqlens) {
    check_shape(name, tokens, {tokens.size(0), cache.size(2), cache.size(3)});
  } else {
    check_shape(name, tokens, {batch, tokens.size(1), cache.size(2), cache.size(3)});
  }
}

}  // namespace

Tensor append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
                 const Tensor& cache_seqlens, const std::optional<Tensor>& cu_seqlens_k_new,
                 const std::optional<Tensor>& cache_batch_idx, const std::optional<Tensor>& block_table,
                 bool rotary_interleaved) {
  const Dtype dtype = dtype_of(k_cache);
  const int64_t batch = cache_seqlens.numel();
  check_batch(batch);
  check_tokens("k", k, "k_cache", k_cache, k_cache, batch, cu_seqlens_k_new);
  check_tokens("v", v, "v_cache", v_cache, k_cache, batch, cu_seqlens_k_new);
  const int64_t row_dim = cu_seqlens_k_new ? 0 : 1;
  check(v.size(row_dim) == k.size(row_dim), "v must have k's tokens, got ", shape_of(v), " and ", shape_of(k));
  check_ints("cu_seqlens_k_new", cu_seqlens_k_new, k_cache, batch + 1);
  check(rotary_cos.has_value() == rotary_sin.has_value(), "rotary_cos and rotary_sin go together");
  const CachePlaces places = cache_places_of(k_cache, cache_seqlens, cache_batch_idx, block_table);

  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  std::optional<RotaryTables> tables;
  if (rotary_cos) tables.emplace(*rotary_cos, *rotary_sin, k_cache, k_cache.size(3));
  const Tensor lengths = allocate_like(cache_seqlens, {batch});
  const AppendParams params{.tokens = token_layout_of(k, batch, cu_seqlens_k_new),
                            .lengths = static_cast<int*>(lengths.mutable_data_ptr()),
                            .k = token_operand_of(k),
                            .v = token_operand_of(v),
                            .k_cache = token_operand_of(k_cache),
                            .v_cache = token_operand_of(v_cache),
                            .places = places,
                            .rotary = tables ? tables->params(rotary_interleaved) : RotaryParams{},
                            .num_heads = static_cast<int>(k_cache.size(2)),
                            .head_dim = static_cast<int>(k_cache.size(3)),
                            .head_dim_v = static_cast<int>(v_cache.size(3))};
  const TokenAccess access = token_access_of({&k, &v, &k_cache, &v_cache});
  const cudaError_t error = launch_append_kv(params, dtype, access, current_stream(k_cache));
  check_cuda(error, "launching the append of k and v");
  return lengths;
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& offsets,
              const std::optional<Tensor>& cu_seqlens, bool interleaved, bool advance) {
  const Dtype dtype = dtype_of(x);
  const int64_t rank = cu_seqlens ? 3 : 4;
  check(x.dim() == rank, "x must have ", rank, " dimensions, got ", shape_of(x));
  const int64_t batch = cu_seqlens ? offsets.numel() : x.size(0);
  check_batch(batch);
  check_ints("offsets", offsets, x, batch);
  check_ints("cu_seqlens", cu_seqlens, x, batch + 1);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const RotaryTables tables(cos, sin, x, x.size(rank - 1));
  const Tensor out = allocate_like(x, sizes_of(x));
  const RotateParams params{.tokens = token_layout_of(x, batch, cu_seqlens),
                            .x = token_operand_of(x),
                            .out = token_operand_of(out),
                            .rotary = tables.params(interleaved),
                            .offsets = int_pointer(offsets),
                            .positions = advance ? RotaryPositions::kSuccessive : RotaryPositions::kSame,
                            .num_heads = static_cast<int>(x.size(rank - 2)),
                            .head_dim = static_cast<int>(x.size(rank - 1))};
  const cudaError_t error = launch_rotary(params, dtype, token_access_of({&x, &out}), current_stream(x));
  check_cuda(error, "launching the rotary embedding");
  return out;
}

}  // namespace flash_attn
