// Not flash_attn_combine's kernel: a part lies in its thread block's slot, which depends on the lengths, and entries
// that were not split have none.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/common/seq_info.h"
#include "kernels/common/split_schedule.h"
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

// Rows of the workspace that hold a row's parts: first, first + stride, ...
struct Parts {
  int count;
  int64_t first;
  int64_t stride;
};

// What the thread blocks wrote down, held within the workspace whatever the lengths were.
__device__ Parts find_parts(const ForwardParams& params, const OutputRow& row, int tile_m) {
  const SplitParams& split = params.split;
  const SplitParams::Entry entry = split.entries[row.seq.batch_idx];
  const int packed_heads = split.packed_heads.divisor();
  const int num_head_runs = params.heads.num_heads / packed_heads;
  const int64_t row_tiles = (static_cast<int64_t>(row.seq.rows_q) * packed_heads + tile_m - 1) / tile_m;
  const int64_t packed_row = static_cast<int64_t>(row.query) * packed_heads + row.head_idx % packed_heads;
  const int64_t last_slot = entry.first_slot + row_tiles * entry.num_splits - 1;
  if (entry.num_splits > kMaxSplits || entry.first_slot < 0 || last_slot >= split.num_slots) return {0, 0, 0};
  const int64_t slot = entry.first_slot + packed_row / tile_m;
  const int64_t tile_idx = slot * num_head_runs + row.head_idx / packed_heads;
  return {entry.num_splits, tile_idx * tile_m + packed_row % tile_m, row_tiles * num_head_runs * tile_m};
}

struct SharedStorage {
  float weights[kMaxSplits];
  float4 sums[kNumThreads];
};

// The parts' shares of the row's sum, in shared memory, and the row's LSE. Every warp finds the same LSE.
__device__ float find_weights(const Parts& parts, const float* lse, float sink, float* weights) {
  const int lane = threadIdx.x % detail::kLanes;
  float highest = sink;
  for (int i = lane; i < parts.count; i += detail::kLanes) {
    highest = fmaxf(highest, lse[parts.first + i * parts.stride]);
  }
#pragma unroll
  for (int distance = detail::kLanes / 2; distance > 0; distance /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(detail::kWholeWarp, highest, distance));
  }
  if (highest == -INFINITY) highest = 0.f;
  float sum = 0.f;
  for (int i = lane; i < parts.count; i += detail::kLanes) sum += expf(lse[parts.first + i * parts.stride] - highest);
#pragma unroll
  for (int distance = detail::kLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(detail::kWholeWarp, sum, distance);
  }
  const float total = highest + logf(sum + expf(sink - highest));
  for (int i = threadIdx.x; i < parts.count; i += kNumThreads) {
    const float part = lse[parts.first + i * parts.stride];
    weights[i] = part == -INFINITY ? 0.f : expf(part - total);
  }
  return total;
}

// Threads take columns of a row, and where it is short, every so many-th part.
__device__ float4 weighted_sum(const Parts& parts, const float* o, int head_dim_v, SharedStorage& smem) {
  const int threads_per_part = head_dim_v / kColumns;
  const int num_groups = kNumThreads / threads_per_part;
  const int group = threadIdx.x / threads_per_part;
  const int column = threadIdx.x % threads_per_part * kColumns;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if (group < num_groups) {
#pragma unroll 4
    for (int i = group; i < parts.count; i += num_groups) {
      const float4 part = *reinterpret_cast<const float4*>(o + (parts.first + i * parts.stride) * head_dim_v + column);
      const float weight = smem.weights[i];
      sum.x += weight * part.x;
      sum.y += weight * part.y;
      sum.z += weight * part.z;
      sum.w += weight * part.w;
    }
  }
  smem.sums[threadIdx.x] = sum;
  __syncthreads();
  for (int other = 1; group == 0 && other < num_groups; ++other) {
    const float4 part = smem.sums[threadIdx.x + other * threads_per_part];
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  return sum;
}

__device__ void store_pair(__half2* target, float x, float y) { *target = __floats2half2_rn(x, y); }
__device__ void store_pair(__nv_bfloat162* target, float x, float y) { *target = __floats2bfloat162_rn(x, y); }

template <class Pair>
__global__ void __launch_bounds__(kNumThreads)
    merge_splits_kernel(const __grid_constant__ ForwardParams params, int tile_m) {
  __shared__ SharedStorage smem;
  const OutputRow row = locate_row(params, blockIdx.x);
  const SeqInfo& seq = row.seq;
  // Rows of no entry, and entries in one part, have their results.
  if (seq.batch_idx >= params.seq.batch || row.query < 0 || row.query >= seq.rows_q) return;
  const Parts parts = find_parts(params, row, tile_m);
  if (parts.count <= 1) return;

  const bool is_used = row.query < seq.seqlen_q;
  const float sink = params.sink.scores == nullptr || !is_used ? -INFINITY : params.sink.scores[row.head_idx];
  const float lse = find_weights(parts, params.split.lse, sink, smem.weights);
  if (threadIdx.x == 0) {
    params.lse.ptr[seq.batch_idx * params.lse.batch_stride + row.head_idx * params.lse.head_stride + seq.row_begin_q +
                   row.query] = lse;
  }
  __syncthreads();
  const float4 sum = weighted_sum(parts, params.split.o, params.heads.head_dim_v, smem);
  const int column = threadIdx.x * kColumns;
  if (column >= params.heads.head_dim_v) return;
  const int64_t offset = seq.batch_idx * params.o.batch_stride + (seq.row_begin_q + row.query) * params.o.row_stride +
                         row.head_idx * params.o.head_stride + column;
  Pair* target = static_cast<Pair*>(params.o.ptr) + offset / 2;
  store_pair(target, sum.x, sum.y);
  store_pair(target + 1, sum.z, sum.w);
}

}  // namespace

cudaError_t launch_merge_splits(const ForwardParams& params, Dtype dtype, int tile_m, cudaStream_t stream) {
  const bool is_dense = params.seq.cu_seqlens_q == nullptr;
  const int num_rows = params.seq.rows_q * (is_dense ? params.seq.batch : 1) * params.heads.num_heads;
  if (num_rows > 0) {
    const auto kernel = dtype == Dtype::kFp16 ? &merge_splits_kernel<__half2> : &merge_splits_kernel<__nv_bfloat162>;
    kernel<<<num_rows, kNumThreads, 0, stream>>>(params, tile_m);
  }
  return cudaGetLastError();
}

}  // namespace flash_attn
