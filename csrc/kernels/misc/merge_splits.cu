// Not flash_attn_combine's kernel, though its arithmetic: a part lies in its thread block's slot, which depends on the
// lengths, entries that were not split have none, and sinks join here.
#include <algorithm>
#include <type_traits>

#include "kernels/common/bisection.h"
#include "kernels/common/row_address.h"
#include "kernels/common/row_map.h"
#include "kernels/common/seq_info.h"
#include "kernels/common/start_kernel.h"
#include "kernels/misc/combine_row.h"
#include "kernels/misc/merge_splits.h"
#include "variant/rounding.h"
#include "variant/tiles.h"

namespace flash_attn {
namespace {

constexpr int kNumThreads = 256;
constexpr int kColumns = 4;  // that a lane loads at once
// Threads that an H200 holds at a time. Where rows are too few for so many, several groups of lanes share a row's
// parts.
constexpr int64_t kThreadsEnough = 132 * 2048;

// How the groups of lanes of all thread blocks share rows out: `num_shares` neighbouring ones have one.
struct RowSharing {
  int64_t num_rows;
  int num_shares;
};

// One row of O: a query of a head.
struct OutputRow {
  SeqInfo seq;
  int query;  // within the entry
  int head_idx;
};

__device__ OutputRow locate_row(const ForwardParams& params, int64_t row_idx) {
  const int head_idx = static_cast<int>(row_idx % params.heads.num_heads);
  const int row = static_cast<int>(row_idx / params.heads.num_heads);
  const SeqParams& seq = params.seq;
  if (seq.cu_seqlens_q == nullptr) return {entry_info(seq, row / seq.rows_q), row % seq.rows_q, head_idx};
  const auto begins = [&](int entry) { return row_at(seq.cu_seqlens_q, entry, seq.rows_q) <= row; };
  const SeqInfo info = entry_info(seq, last_entry(seq.batch, begins));
  return {info, row - static_cast<int>(info.row_begin_q), head_idx};
}

// Where the thread blocks noted that the parts are; none, should that lie outside of the workspace.
__device__ RowParts<float> find_parts(const ForwardParams& params, const OutputRow& row, int tile_m) {
  const SplitParams& split = params.split;
  const SplitParams::Entry entry = split.entries[row.seq.batch_idx];
  const int packed_heads = split.packed_heads.divisor();
  const int num_head_runs = params.heads.num_heads / packed_heads;
  const int64_t row_tiles = num_row_tiles(row.seq.rows_q, packed_heads, tile_m);
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
          parts.lse_stride * n, ceil_div(parts.count - first, n)};
}

// The parts of a row, or none where it is there already: rows of no entry, and entries in one part.
__device__ RowParts<float> parts_to_merge(const ForwardParams& params, const OutputRow& row, int tile_m) {
  const SeqInfo& seq = row.seq;
  if (seq.batch_idx >= params.seq.batch || row.query < 0 || row.query >= seq.rows_q) return {};
  const RowParts<float> parts = find_parts(params, row, tile_m);
  return parts.count > 1 ? parts : RowParts<float>{};
}

// A group of lanes merges a row, or its share of the row's parts.
template <class Element, class Lanes, int kPieces>
__global__ void __launch_bounds__(kNumThreads)
    merge_splits_kernel(const __grid_constant__ ForwardParams params, RowSharing sharing, int tile_m) {
  using Columns = LaneColumns<Lanes, kPieces, kColumns>;
  const int group = threadIdx.x / Lanes::kCount;
  const int share = group % sharing.num_shares;
  const int64_t rows_per_block = kNumThreads / Lanes::kCount / sharing.num_shares;
  const int64_t row_idx = blockIdx.x * rows_per_block + group / sharing.num_shares;
  const bool exists = row_idx < sharing.num_rows;
  const OutputRow row = locate_row(params, exists ? row_idx : 0);
  const RowParts<float> parts = exists ? parts_to_merge(params, row, tile_m) : RowParts<float>{};
  const int head_dim_v = params.heads.head_dim_v;

  const bool has_sink = params.sink.scores != nullptr && row.query < row.seq.seqlen_q;
  const float lse = log_add_exp(combined_lse<Lanes>(parts), has_sink ? params.sink.scores[row.head_idx] : -INFINITY);
  Columns sum =
      combined_columns<Lanes, kPieces, kColumns>(every_nth(parts, share, sharing.num_shares), lse, 0, head_dim_v);
  if (sharing.num_shares > 1) {
    __shared__ Columns sums[kNumThreads];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int other = 1; share == 0 && other < sharing.num_shares; ++other) {
      sum.add(sums[threadIdx.x + other * Lanes::kCount]);
    }
  }
  if (share > 0 || parts.count == 0) return;
  const SeqInfo& seq = row.seq;
  const int64_t row_of_tensor = seq.row_begin_q + row.query;
  if (Lanes::idx() == 0) {
    params.lse.ptr[seq.batch_idx * params.lse.batch_stride + row.head_idx * params.lse.head_stride + row_of_tensor] =
        lse;
  }
  sum.store(row_of<Element>(params.o, seq.batch_idx, row_of_tensor, row.head_idx), 0, head_dim_v);
}

template <class Element, class Lanes, int kPieces>
void start_merge(const ForwardParams& params, int64_t num_rows, int tile_m, cudaStream_t stream) {
  constexpr int kNumGroups = kNumThreads / Lanes::kCount;
  const int most_parts = params.split.num_splits > 0 ? params.split.num_splits : kMaxSplits;
  int num_shares = 1;
  while (2 * num_shares <= std::min(kNumGroups, most_parts) &&
         2 * num_shares * num_rows * Lanes::kCount <= kThreadsEnough) {
    num_shares *= 2;
  }
  const int rows_per_block = kNumGroups / num_shares;
  const int num_blocks = static_cast<int>(ceil_div(num_rows, rows_per_block));
  start_kernel(&merge_splits_kernel<Element, Lanes, kPieces>, {num_blocks, kNumThreads, 0, stream}, params,
               RowSharing{num_rows, num_shares}, tile_m);
}

// Calls `start(element, lanes, pieces)` with what a kernel for rows of so many columns is made from.
template <class Element, class Start>
void with_lanes(int head_dim_v, const Start& start) {
  if (head_dim_v <= 16 * kColumns) return start(Element{}, RowLanes<16>{}, std::integral_constant<int, 1>{});
  if (head_dim_v <= 32 * kColumns) return start(Element{}, RowLanes<32>{}, std::integral_constant<int, 1>{});
  if (head_dim_v <= 64 * kColumns) return start(Element{}, RowLanes<32>{}, std::integral_constant<int, 2>{});
  return start(Element{}, RowLanes<32>{}, std::integral_constant<int, 4>{});
}

}  // namespace

cudaError_t launch_merge_splits(const ForwardParams& params, Dtype dtype, int tile_m, cudaStream_t stream) {
  const int64_t num_queries = int64_t{params.seq.rows_q} * (params.seq.cu_seqlens_q == nullptr ? params.seq.batch : 1);
  const int64_t num_rows = num_queries * params.heads.num_heads;
  if (num_rows == 0) return cudaGetLastError();
  const auto start = [&](auto element, auto lanes, auto pieces) {
    start_merge<decltype(element), decltype(lanes), pieces>(params, num_rows, tile_m, stream);
  };
  if (dtype == Dtype::kFp16) {
    with_lanes<__half>(params.heads.head_dim_v, start);
  } else {
    with_lanes<__nv_bfloat16>(params.heads.head_dim_v, start);
  }
  return cudaGetLastError();
}

}  // namespace flash_attn
