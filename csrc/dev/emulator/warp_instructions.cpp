#include "dev/emulator/warp_instructions.h"

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "dev/emulator/memory_check.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {
namespace {

constexpr int kMatrixRows = 8;
constexpr int kNumMatrices = 4;
constexpr int kRowBytes = 16;

template <class Element>
float element_of(uint32_t pair, int idx) {
  return static_cast<float>(Element::bitcast(static_cast<uint16_t>(pair >> (16 * idx))));
}

}  // namespace

// Lane 4 g + t holds rows g and g + 8 of A and of the sums, column g of B, and pairs of neighbours from 2 t on along
// the other axis (PTX ISA, 'Matrix Fragments for mma.m16n8k16').
// Tensor cores add products to each other before they add them to a sum (Fasi, Higham, Mikaitis and Pranesh, 'Numerical
// behavior of NVIDIA tensor cores', 2021). One by one, 512 equal ones would be rounded the same way 512 times.
template <class Element>
void multiply_matrices(MmaOperands& own) {
  meet_with(kAllLanes, own, [](unsigned, auto lane_of) {
    float a[16][16];
    float b[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const MmaOperands& from = lane_of(lane);
      const int g = lane / 4;
      for (int i = 0; i < 2; ++i) {
        const int t = lane % 4 * 2 + i;
        for (int part = 0; part < 4; ++part) {
          a[g + part % 2 * 8][t + part / 2 * 8] = element_of<Element>(from.a[part], i);
        }
        for (int part = 0; part < 2; ++part) b[t + part * 8][g] = element_of<Element>(from.b[part], i);
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float products = 0.f;
        for (int k = 0; k < 16; ++k) products += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
        lane_of(lane).sums[i] += products;
      }
    }
  });
}

template void multiply_matrices<cutlass::half_t>(MmaOperands& own);
template void multiply_matrices<cutlass::bfloat16_t>(MmaOperands& own);

// Lane 8 i + r names row r of matrix i; lane 4 g + t gets of each matrix the elements 2 t and 2 t + 1 of row g, or,
// transposed, of column g.
template <MatrixOrder kOrder>
void load_matrices(const void* row, uint32_t (&own)[4]) {
  struct Operands {
    const uint16_t* row;
    uint32_t (&result)[4];
  };
  if (reinterpret_cast<uintptr_t>(row) % kRowBytes != 0) fail("ldmatrix of a row that is not aligned to 16 bytes");
  memory::read(row, kRowBytes);
  Operands operands{static_cast<const uint16_t*>(row), own};
  meet_with(kAllLanes, operands, [](unsigned, auto lane_of) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < kNumMatrices; ++i) {
        const auto element = [&](int column) -> uint32_t {
          return kOrder == MatrixOrder::kRows ? lane_of(kMatrixRows * i + lane / 4).row[column]
                                              : lane_of(kMatrixRows * i + column).row[lane / 4];
        };
        lane_of(lane).result[i] = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
      }
    }
  });
}

template void load_matrices<MatrixOrder::kRows>(const void* row, uint32_t (&own)[4]);
template void load_matrices<MatrixOrder::kTransposed>(const void* row, uint32_t (&own)[4]);

void store_matrices(const uint32_t (&own)[4], void* row) {
  struct Operands {
    const uint32_t (&own)[4];
    uint32_t* row;
  };
  if (reinterpret_cast<uintptr_t>(row) % kRowBytes != 0) fail("stmatrix of a row that is not aligned to 16 bytes");
  memory::write(row, kRowBytes);
  Operands operands{own, static_cast<uint32_t*>(row)};
  meet_with(kAllLanes, operands, [](unsigned, auto lane_of) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < kNumMatrices; ++i) lane_of(kMatrixRows * i + lane / 4).row[lane % 4] = lane_of(lane).own[i];
    }
  });
}

}  // namespace flash_attn::emulator
