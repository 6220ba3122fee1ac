// What nvcc knows without a header, as far as our kernels use it. Included before everything else of a kernel's file.
#pragma once

#include <cuda_runtime.h>

// CuTe's own gives every address as 0 where there is no GPU.
#define cast_smem_ptr_to_uint cast_smem_ptr_to_uint_of_cute
#include <cute/arch/util.hpp>
#undef cast_smem_ptr_to_uint

#include <bit>
#include <cmath>
#include <cstdint>

#include "dev/emulator/memory_check.h"
#include "dev/emulator/thread_block.h"
#include "dev/emulator/warp_instructions.h"

namespace cute {

inline uint32_t cast_smem_ptr_to_uint(const void* ptr) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(ptr) - flash_attn::emulator::memory::smem());
}

}  // namespace cute

#define FLASH_ATTN_EMULATED

// Thread blocks run one after the other.
#undef __shared__
#define __shared__ static

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#define threadIdx ::flash_attn::emulator::thread_idx
#define blockIdx ::flash_attn::emulator::block_idx
#define blockDim ::flash_attn::emulator::block_dim
#define gridDim ::flash_attn::emulator::grid_dim

inline void __syncthreads() { flash_attn::emulator::sync_block(); }
inline void __syncwarp(unsigned lanes = flash_attn::emulator::kAllLanes) { flash_attn::emulator::sync_warp(lanes); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned lanes, T value, int from) {
  return flash_attn::emulator::show(lanes, value, from);
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  return flash_attn::emulator::show(lanes, value, flash_attn::emulator::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned lanes, T value, int distance) {
  const int lane = flash_attn::emulator::lane();
  return flash_attn::emulator::show(lanes, value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned lanes, bool vote) { return flash_attn::emulator::ballot(lanes, vote); }
inline bool __any_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, vote) != 0; }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
// These round, whatever the compiler would fuse them with.
inline float rounded(float x) {
  const volatile float result = x;
  return result;
}
inline float __fmul_rn(float a, float b) { return rounded(a * b); }
inline float __fadd_rn(float a, float b) { return rounded(a + b); }
inline float __fsub_rn(float a, float b) { return rounded(a - b); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
using std::isinf;
