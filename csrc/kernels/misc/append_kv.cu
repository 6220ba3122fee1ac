#include "kernels/common/start_kernel.h"
#include "kernels/misc/append_kv.h"
#include "kernels/misc/token_launch.h"

namespace flash_attn {
namespace {

struct TokenPlace {
  bool exists;
  int64_t page_idx;
  int64_t row;
  int64_t position;
};

// A token whose position, cache row or page does not exist has no place, and is dropped: CUDA tensors hold metadata
// that no host has seen.
__device__ TokenPlace find_place(const AppendParams& params, const TokenCoord& token) {
  constexpr TokenPlace kNone{};
  if (token.entry < 0) return kNone;
  const CachePlaces& places = params.places;
  const int64_t position = places.cache_seqlens[token.entry] + token.row;
  const bool paged = places.has_pages;
  const int64_t capacity = (paged ? places.pages_per_row : 1) * places.page_size;
  if (position < 0 || position >= capacity) return kNone;
  if (params.rotary.half_dim > 0 && !has_position(params.rotary, position)) return kNone;
  const int64_t row = places.cache_batch_idx == nullptr ? token.entry : places.cache_batch_idx[token.entry];
  if (row < 0 || row >= (paged ? places.num_table_rows : places.num_pages)) return kNone;
  if (!paged) return {true, row, position, position};
  const int64_t page_idx = places.block_table[row * places.table_stride + position / places.page_size];
  if (page_idx < 0 || page_idx >= places.num_pages) return kNone;
  return {true, page_idx, position % places.page_size, position};
}

// A length counts tokens that were dropped, too: it is what the caller said.
__device__ void write_lengths(const AppendParams& params) {
  const int* cu_seqlens = params.tokens.cu_seqlens;
  for (int entry = threadIdx.x; entry < params.tokens.batch; entry += kTokenThreads) {
    const int num_new =
        cu_seqlens == nullptr ? static_cast<int>(params.tokens.num_rows) : cu_seqlens[entry + 1] - cu_seqlens[entry];
    params.lengths[entry] = params.places.cache_seqlens[entry] + num_new;
  }
}

// One thread block per token.
template <class Element, int kColumns>
__global__ void __launch_bounds__(kTokenThreads)
    append_kv_kernel(const __grid_constant__ AppendParams params, int64_t num_tokens) {
  if (blockIdx.x == 0) write_lengths(params);
  for (int64_t idx = blockIdx.x; idx < num_tokens; idx += gridDim.x) {
    const TokenCoord token = locate_token(params.tokens, idx);
    const TokenPlace place = find_place(params, token);
    if (!place.exists) continue;
    for_each_piece<kColumns>(params.num_heads, params.head_dim, [&](int head_idx, int column) {
      const auto from = row_of<Element>(params.k, token.source_batch_idx, token.source_row, head_idx);
      const auto to = row_of<Element>(params.k_cache, place.page_idx, place.row, head_idx);
      store_vector(to.at(column), params.rotary.half_dim == 0
                                      ? load_vector<kColumns>(from.at(column))
                                      : rotated<kColumns>(from, column, params.rotary, place.position));
    });
    for_each_piece<kColumns>(params.num_heads, params.head_dim_v, [&](int head_idx, int column) {
      const auto from = row_of<Element>(params.v, token.source_batch_idx, token.source_row, head_idx);
      const auto to = row_of<Element>(params.v_cache, place.page_idx, place.row, head_idx);
      store_vector(to.at(column), load_vector<kColumns>(from.at(column)));
    });
  }
}

}  // namespace

cudaError_t launch_append_kv(const AppendParams& params, Dtype dtype, TokenAccess access, cudaStream_t stream) {
  if (params.tokens.batch == 0) return cudaSuccess;
  const int64_t num_tokens = params.tokens.num_tokens();
  const int64_t least = 1;  // thread block, for the lengths
  return launch_over_tokens(std::max(num_tokens, least), dtype, access,
                            [&](auto element, auto columns, int num_blocks) {
                              start_kernel(&append_kv_kernel<decltype(element), columns>,
                                           {num_blocks, kTokenThreads, 0, stream}, params, num_tokens);
                            });
}

}  // namespace flash_attn
