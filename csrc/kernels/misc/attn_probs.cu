#include <algorithm>
#include <limits>

#include "kernels/common/kv_range.h"
#include "kernels/common/kv_rows.h"
#include "kernels/common/philox.h"
#include "kernels/common/row_address.h"
#include "kernels/common/start_kernel.h"
#include "kernels/misc/attn_probs.h"
#include "kernels/misc/elements.h"
#include "variant/tiles.h"

namespace flash_attn {
namespace {

constexpr int kNumThreads = kProbsMultiple;

template <class Element>
__device__ float dot(const Element* a, const Element* b, int head_dim) {
  float sum = 0.f;
  for (int column = 0; column < head_dim; column += kVectorElements) {
    const auto x = load_vector<kVectorElements>(a + column);
    const auto y = load_vector<kVectorElements>(b + column);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) sum += to_float(x.at[i]) * to_float(y.at[i]);
  }
  return sum;
}

template <class Element>
__device__ float signed_probability(const AttnProbsParams& params, const SeqInfo& seq, int head_idx, int row, int key) {
  const VisibleKeys<Mask::kGeneral> visible{seq, params.window};
  if (row >= seq.seqlen_q || key < visible.begin(row) || key >= visible.end(row)) return 0.f;
  const int64_t query = seq.row_begin_q + row;
  const auto* const q_row = row_of<const Element>(params.q, seq.batch_idx, query, head_idx);
  const KvRows<Element> keys(params.k, params.page, seq, head_idx / params.heads.num_heads_per_kv);
  const Element* const k_row = keys.in_pages() ? keys.row(key) : keys.head() + key * keys.row_stride();

  const ScoreParams& score = params.score;
  float s = dot(q_row, k_row, params.heads.head_dim) * score.score_factor;
  if (score.has_softcap) s = tanhf(s);
  s *= score.softmax_scale;
  if (score.alibi_slopes != nullptr) {
    const float slope = score.alibi_slopes[seq.batch_idx * score.alibi_batch_stride + head_idx];
    s -= slope * static_cast<float>(abs(row + seq.diagonal() - key));
  }
  const LseOperand& lse = params.lse;
  const float p = expf(s - lse.ptr[seq.batch_idx * lse.batch_stride + head_idx * lse.head_stride + query]);
  if (params.dropout.rng_state == nullptr) return p;
  const DropoutStream stream(params.dropout, params.heads.num_heads, seq.batch_idx, head_idx);
  return stream.byte_of(row, key) <= params.dropout.keep_threshold ? p : -p;
}

// One thread per probability, one thread block per kNumThreads columns of a row.
template <class Element>
__global__ void __launch_bounds__(kNumThreads)
    attn_probs_kernel(const __grid_constant__ AttnProbsParams params, int64_t num_pieces) {
  const int pieces_per_row = params.num_columns / kNumThreads;
  for (int64_t piece = blockIdx.x; piece < num_pieces; piece += gridDim.x) {
    const int64_t run = piece / pieces_per_row;
    const int row = static_cast<int>(run % params.num_rows);
    const int64_t head_run = run / params.num_rows;
    const int head_idx = static_cast<int>(head_run % params.heads.num_heads);
    const SeqInfo seq = entry_info(params.seq, static_cast<int>(head_run / params.heads.num_heads));
    const int key = static_cast<int>(piece % pieces_per_row) * kNumThreads + threadIdx.x;
    static_cast<Element*>(params.probs)[run * params.num_columns + key] =
        from_float<Element>(signed_probability<Element>(params, seq, head_idx, row, key));
  }
}

}  // namespace

cudaError_t launch_attn_probs(const AttnProbsParams& params, Dtype dtype, cudaStream_t stream) {
  const int64_t num_pieces = static_cast<int64_t>(params.seq.batch) * params.heads.num_heads * params.num_rows *
                             (params.num_columns / kNumThreads);
  if (num_pieces == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  const auto kernel = dtype == Dtype::kFp16 ? &attn_probs_kernel<__half> : &attn_probs_kernel<__nv_bfloat16>;
  const int num_blocks = static_cast<int>(std::min(num_pieces, kMaxBlocks));
  start_kernel(kernel, {num_blocks, kNumThreads, 0, stream}, params, num_pieces);
  return cudaGetLastError();
}

}  // namespace flash_attn
