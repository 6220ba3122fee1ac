// Hardware operations that C++ has no name for. Kernels use them through this header and the one of the same name in
// their architecture's folder; csrc/dev/emulator has its own versions of both, for the CPU.
#pragma once

#include <cuda_runtime.h>

namespace flash_attn {

// The thread block's dynamic shared memory, from its start.
template <class T>
__device__ T& dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char dynamic_smem_bytes[];
  return *reinterpret_cast<T*>(dynamic_smem_bytes);
}

// One instruction. exp2f would also handle subnormal results, which are negligible beside the 1 of a row's maximum.
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x with an error of one unit in the last place; 0 for infinity.
__device__ inline float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger of the two, or NaN if either is NaN, which fmaxf would hide.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// What another thread block wrote before the store_release of the value read here can be read after this.
__device__ inline int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// The same address, its origin hidden from the compiler: what lies at constant distances from it is then reached by
// immediate offsets, not by an address computed for each.
template <class T>
__device__ T* as_base(T* address) {
  asm("" : "+l"(address));
  return address;
}

// Yields to other warps for about 32 nanoseconds.
__device__ inline void pause() { __nanosleep(32); }

// Adds without returning the old value. (nvcc 13.0 compiles an atomicAdd whose result is unused to an ATOMG, which
// returns it.)
__device__ inline void add_to_global(float* to, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

// Returns the old value; says nothing about what other threads wrote elsewhere.
__device__ inline int fetch_and_increment(int* counter) {
  int value;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ inline void store_release(int* to, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

}  // namespace flash_attn
