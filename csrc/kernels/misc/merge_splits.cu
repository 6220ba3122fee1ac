// Not flash_attn_combine's kernel, though its arithmetic: a part lies in its thread block's slot, which depends on the
// lengths, entries that were not split have none, and sinks join here.
#include "kernels/common/seq_info.h"
#include "kernels/common/start_kernel.h"
#include "kernels/misc/combine_row.h"
#include "kernels/misc/merge_splits.h"
#include "variant/tiles.h"

namespace flash_attn {
namespace {

constexpr int kNumThreads = 256;
constexpr int kColumns = 4;  // of a row, in one thread

// One row of O: a query of a head.
struct OutputRow {
  SeqInfo seq;
  int query;  // within the entry
  int head_idx;
};

__device__ OutputRow locate_row(const ForwardParams& params, int block_idx) {
  const int head_idx = block_idx % params.heads.num_heads;
  const int row = block_idx / params.heads.num_heads;
  const SeqParams& seq = params.seq;
  if (seq.cu_seqlens_q == nullptr) return {detail::entry_info(seq, row / seq.rows_q), row % seq.rows_q, head_idx};
  int low = 0;
  int high = seq.batch;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (detail::row_at(seq.cu_seqlens_q, middle, seq.rows_q) <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const SeqInfo info = detail::entry_info(seq, low);
  return {info, row - static_cast<int>(info.row_begin_q), head_idx};
}

// What the thread blocks wrote down, held within the workspace whatever the lengths were.
__device__ RowParts<float> find_parts(const ForwardParams& params, const OutputRow& row, int tile_m) {
  const SplitParams& split = params.split;
  const SplitParams::Entry entry = split.entries[row.seq.batch_idx];
  const int packed_heads = split.packed_heads.divisor();
  const int num_head_runs = params.heads.num_heads / packed_heads;
  const int64_t row_tiles = (static_cast<int64_t>(row.seq.rows_q) * packed_heads + tile_m - 1) / tile_m;
  const int64_t packed_row = static_cast<int64_t>(row.query) * packed_heads + row.head_idx % packed_heads;
  const int64_t last_slot = entry.first_slot + row_tiles * entry.num_splits - 1;
  if (entry.num_splits > kMaxSplits || entry.first_slot < 0 || last_slot >= split.num_slots) return {};
  const int64_t tile_idx = (entry.first_slot + packed_row / tile_m) * num_head_runs + row.head_idx / packed_heads;
  const int64_t first = tile_idx * tile_m + packed_row % tile_m;
  const int64_t stride = row_tiles * num_head_runs * tile_m;
  const int head_dim_v = params.heads.head_dim_v;
  return {split.o + first * head_dim_v, stride * head_dim_v, split.lse + first, stride, entry.num_splits};
}

// Every so many-th part, from one on.
__device__ RowParts<float> every_nth(const RowParts<float>& parts, int first, int n) {
  return {parts.out + first * parts.out_stride, parts.out_stride * n, parts.lse + first * parts.lse_stride,
          parts.lse_stride * n, (parts.count - first + n - 1) / n};
}

template <class Element>
__global__ void __launch_bounds__(kNumThreads)
    merge_splits_kernel(const __grid_constant__ ForwardParams params, int tile_m) {
  const OutputRow row = locate_row(params, blockIdx.x);
  const SeqInfo& seq = row.seq;
  // Rows of no entry, and entries in one part, have their results.
  if (seq.batch_idx >= params.seq.batch || row.query < 0 || row.query >= seq.rows_q) return;
  const RowParts<float> parts = find_parts(params, row, tile_m);
  if (parts.count <= 1) return;

  const bool has_sink = params.sink.scores != nullptr && row.query < seq.seqlen_q;
  const float lse = log_add_exp(combined_lse(parts), has_sink ? params.sink.scores[row.head_idx] : -INFINITY);
  if (threadIdx.x == 0) {
    params.lse.ptr[seq.batch_idx * params.lse.batch_stride + row.head_idx * params.lse.head_stride + seq.row_begin_q +
                   row.query] = lse;
  }

  // Threads take columns of the row, and where it is short, a share of the parts.
  const int threads_per_share = params.heads.head_dim_v / kColumns;
  const int num_shares = kNumThreads / threads_per_share;
  const int share = threadIdx.x / threads_per_share;
  const int column = threadIdx.x % threads_per_share * kColumns;
  __shared__ FloatColumns<kColumns> sums[kNumThreads];
  FloatColumns<kColumns> sum{};
  if (share < num_shares) sum = combined_columns<kColumns>(every_nth(parts, share, num_shares), lse, column);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (share > 0) return;
  for (int other = 1; other < num_shares; ++other) {
    const FloatColumns<kColumns>& addend = sums[threadIdx.x + other * threads_per_share];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum.at[i] += addend.at[i];
  }
  ElementVector<Element, kColumns> rounded;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) rounded.at[i] = from_float<Element>(sum.at[i]);
  store_vector(static_cast<Element*>(params.o.ptr) + seq.batch_idx * params.o.batch_stride +
                   (seq.row_begin_q + row.query) * params.o.row_stride + row.head_idx * params.o.head_stride + column,
               rounded);
}

}  // namespace

cudaError_t launch_merge_splits(const ForwardParams& params, Dtype dtype, int tile_m, cudaStream_t stream) {
  const bool is_dense = params.seq.cu_seqlens_q == nullptr;
  const int num_rows = params.seq.rows_q * (is_dense ? params.seq.batch : 1) * params.heads.num_heads;
  if (num_rows > 0) {
    const auto kernel = dtype == Dtype::kFp16 ? &merge_splits_kernel<__half> : &merge_splits_kernel<__nv_bfloat16>;
    start_kernel(kernel, {num_rows, kNumThreads, 0, stream}, params, tile_m);
  }
  return cudaGetLastError();
}

}  // namespace flash_attn
