// What the SM90 kernels with a fault have in common: two tiles in shared memory, and their product.
#pragma once

#include "dev/emulator/faulty_kernels.h"
#include "dev/emulator/thread_block.h"
#include "kernels/common/instructions.h"
#include "kernels/sm90/barriers.h"
#include "kernels/sm90/tensor_map.h"
#include "kernels/sm90/wgmma.h"

namespace flash_attn {

using namespace cute;
using Element = cutlass::bfloat16_t;

constexpr int kRows = 64;
constexpr int kCols = 64;
constexpr int kBoxBytes = kRows * kCols * sizeof(Element);

struct Storage {
  alignas(1024) Element a[kRows * kCols];
  alignas(1024) Element b[kRows * kCols];
  sm90::Mbarrier full;
  sm90::Mbarrier empty;
};

using SmemLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kRows>, Int<kCols>>{}));
using SharedMma = decltype(make_tiled_mma(
    GMMA::ss_op_selector<Element, Element, float, Shape<_64, _64, _64>, GMMA::Major::K, GMMA::Major::K>()));
struct Operands {
  SharedMma mma;
  decltype(mma.get_slice(0).partition_fragment_A(make_tensor(make_smem_ptr<Element>(nullptr), SmemLayout{}))) a;
  decltype(mma.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr<Element>(nullptr), SmemLayout{}))) b;
  decltype(sm90::make_accumulator<64>()) acc;
};

// Operands of the product of both tiles.
inline Operands operands_of(Storage& smem) {
  const auto thread = SharedMma{}.get_slice(threadIdx.x % kThreadsPerWarpgroup);
  return {.mma = {},
          .a = thread.partition_fragment_A(make_tensor(make_smem_ptr(smem.a), SmemLayout{})),
          .b = thread.partition_fragment_B(make_tensor(make_smem_ptr(smem.b), SmemLayout{})),
          .acc = sm90::make_accumulator<64>()};
}

inline void start(Operands& x) { sm90::start_gemm(x.mma, x.a, x.b, x.acc, GMMA::ScaleOut::Zero); }

inline constexpr sm90::BoxCoord kAllRows{.row = sm90::kRowBound - kRows, .row_end = kRows};

// The descriptor of a tensor of kRows x kCols elements.
inline cudaError_t describe(void* tensor, CUtensorMap& descriptor) {
  const sm90::TensorMapSpec spec{.operand = {tensor, 0, kCols, 0},
                                 .num_rows = kRows,
                                 .num_heads = 1,
                                 .batch = 1,
                                 .head_dim = kCols,
                                 .box_rows = kRows,
                                 .box_heads = 1,
                                 .box_cols = kCols};
  sm90::TensorMap map;
  const cudaError_t error = sm90::encode_tensor_map(spec, Dtype::kBf16, &map);
  descriptor = map.descriptor;
  return error;
}

}  // namespace flash_attn
