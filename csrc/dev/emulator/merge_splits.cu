// The kernel that merges parts, on a workspace that a test has filled.
#include "kernels/misc/merge_splits.h"

namespace flash_attn {
namespace {

// In the order in which a test gives them, int64 each. Strides are those of O; K has no part in it.
struct MergeSizes {
  int64_t batch, rows_q, num_heads, head_dim_v, packed_heads, num_slots, num_splits, tile_m;
  int64_t batch_stride, row_stride, head_stride, is_fp16;
};

}  // namespace
}  // namespace flash_attn

// `entries` holds the first slot and the number of splits of each entry. Rows are packed where cu_seqlens_q are given.
extern "C" int flash_attn_merge_splits(void* o, float* lse, float* part_o, float* part_lse, int* entries,
                                       const float* sinks, const int* cu_seqlens_q, const int64_t* sizes) {
  using namespace flash_attn;
  const MergeSizes& size = *reinterpret_cast<const MergeSizes*>(sizes);
  const auto as_int = [](int64_t value) { return static_cast<int>(value); };
  ForwardParams params{};
  params.o = {o, size.batch_stride, size.row_stride, size.head_stride};
  params.lse = {lse, cu_seqlens_q == nullptr ? size.num_heads * size.rows_q : 0, size.rows_q};
  params.heads = {as_int(size.num_heads), 1, as_int(size.head_dim_v), as_int(size.head_dim_v)};
  params.seq.batch = as_int(size.batch);
  params.seq.rows_q = as_int(size.rows_q);
  params.seq.cu_seqlens_q = cu_seqlens_q;
  params.sink.scores = sinks;
  params.split.packed_heads = FastDivisor(as_int(size.packed_heads));
  params.split.num_slots = as_int(size.num_slots);
  params.split.num_splits = as_int(size.num_splits);
  params.split.o = part_o;
  params.split.lse = part_lse;
  params.split.entries = reinterpret_cast<SplitParams::Entry*>(entries);
  return launch_merge_splits(params, size.is_fp16 != 0 ? Dtype::kFp16 : Dtype::kBf16, as_int(size.tile_m), nullptr);
}
