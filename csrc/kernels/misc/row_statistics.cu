#include <cstdint>

#include "kernels/common/logarithm.h"
#include "kernels/common/row_address.h"
#include "kernels/common/start_kernel.h"
#include "kernels/misc/elements.h"
#include "kernels/misc/row_statistics.h"
#include "variant/rounding.h"
#include "variant/tiles.h"

namespace flash_attn {
namespace {

constexpr int kNumThreads = 256;
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerBlock = kNumThreads / kLanesPerRow;
constexpr int kSinkThreads = 1024;

// A batch of one where lengths vary: the rows of all entries are packed.
__host__ __device__ int num_row_runs(const SeqParams& seq) { return seq.cu_seqlens_q == nullptr ? seq.batch : 1; }

// Whether one of this thread's share of the offsets is below the one before it.
__device__ bool decreases(const int* offsets, int batch) {
  if (offsets == nullptr) return false;
  bool found = false;
  for (int i = threadIdx.x; i < batch; i += kNumThreads) found |= offsets[i + 1] < offsets[i];
  return found;
}

// Eight lanes share a row, so that a row of 64 columns is read in whole sectors.
template <class Element>
__global__ void __launch_bounds__(kNumThreads) row_statistics_kernel(const __grid_constant__ BackwardParams params) {
  const SeqParams& seq = params.seq;
  if (blockIdx.x == 0 && params.turns.counters != nullptr &&
      (decreases(seq.cu_seqlens_q, seq.batch) || decreases(seq.cu_seqlens_k, seq.batch))) {
    *params.turns.are_lost = 1;
  }
  const int blocks_per_head = ceil_div(seq.rows_q, kRowsPerBlock);
  const int run = blockIdx.x / blocks_per_head;
  const int head_idx = run % params.heads.num_heads;
  const int batch_idx = run / params.heads.num_heads;
  const int row = blockIdx.x % blocks_per_head * kRowsPerBlock + threadIdx.x / kLanesPerRow;
  if (row >= seq.rows_q) return;  // all lanes of a row, or none

  const RowStatistics& rows = params.rows;
  const int64_t idx = batch_idx * rows.batch_stride + head_idx * rows.head_stride + row;
  const float lse = rows.lse[idx];
  const bool saw_keys = lse != -INFINITY;
  const Element* o = row_of<const Element>(params.o, batch_idx, row, head_idx);
  const Element* dout = row_of<const Element>(params.dout, batch_idx, row, head_idx);
  const int lane = threadIdx.x % kLanesPerRow;
  float delta = 0.f;
  for (int column = lane * kVectorElements; column < params.heads.head_dim_v;
       column += kLanesPerRow * kVectorElements) {
    const auto o_part = load_vector<kVectorElements>(o + column);
    const auto dout_part = load_vector<kVectorElements>(dout + column);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) delta += to_float(o_part.at[i]) * to_float(dout_part.at[i]);
  }
  const unsigned row_lanes = ((1u << kLanesPerRow) - 1)
                             << (threadIdx.x % kThreadsPerWarp / kLanesPerRow * kLanesPerRow);
#pragma unroll
  for (int distance = kLanesPerRow / 2; distance > 0; distance /= 2) {
    delta += __shfl_xor_sync(row_lanes, delta, distance);
  }
  if (lane != 0) return;
  if (rows.dlse != nullptr) delta -= rows.dlse[idx];
  rows.lse_log2[idx] = saw_keys ? lse * kLog2E : INFINITY;
  // A row that is not in use may hold anything in dO.
  rows.delta[idx] = saw_keys ? delta : 0.f;
}

// One thread block per head, whose order of summation never changes. The sink is one more key, of value 0, so that its
// dP is 0 and its gradient -P * delta.
__global__ void __launch_bounds__(kSinkThreads) sink_gradient_kernel(const __grid_constant__ BackwardParams params) {
  const int head_idx = blockIdx.x;
  const RowStatistics& rows = params.rows;
  const float sink_log2 = params.sink.scores[head_idx] * kLog2E;
  float sum = 0.f;
  for (int batch_idx = 0; batch_idx < num_row_runs(params.seq); ++batch_idx) {
    const int64_t first = batch_idx * rows.batch_stride + head_idx * rows.head_stride;
    for (int row = threadIdx.x; row < params.seq.rows_q; row += kSinkThreads) {
      sum -= exp2f(sink_log2 - rows.lse_log2[first + row]) * rows.delta[first + row];
    }
  }
  __shared__ float sums[kSinkThreads];
  sums[threadIdx.x] = sum;
  for (int half = kSinkThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) params.ds_aux[head_idx] = sums[0];
}

}  // namespace

cudaError_t launch_row_statistics(const BackwardParams& params, Dtype dtype, cudaStream_t stream) {
  const int64_t blocks_per_head = ceil_div(params.seq.rows_q, kRowsPerBlock);
  const auto num_blocks = static_cast<int>(blocks_per_head * params.heads.num_heads * num_row_runs(params.seq));
  if (num_blocks > 0) {
    const auto kernel = dtype == Dtype::kFp16 ? &row_statistics_kernel<__half> : &row_statistics_kernel<__nv_bfloat16>;
    start_kernel(kernel, {num_blocks, kNumThreads, 0, stream}, params);
  }
  if (params.sink.scores != nullptr && params.heads.num_heads > 0) {
    start_kernel(&sink_gradient_kernel, {params.heads.num_heads, kSinkThreads, 0, stream}, params);
  }
  return cudaGetLastError();
}

}  // namespace flash_attn
