// What of the machine C++ has no name for. Kernels reach the hardware through this header and the one of the same name
// in their architecture's folder; csrc/dev/emulator has its own of both, for the CPU.
#pragma once

#include <cuda_runtime.h>

namespace flash_attn {

// The thread block's dynamic shared memory, from its start.
template <class T>
__device__ T& dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char dynamic_smem_bytes[];
  return *reinterpret_cast<T*>(dynamic_smem_bytes);
}

// One instruction; exp2f would add the handling of subnormal results, which are nothing beside a row's maximum of 1.
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger one; not a number where one of them is none, which fmaxf would hide.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// What other thread blocks wrote before the store_release of the value that is read can be read after this.
__device__ inline int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// The same address, of which the compiler does not know how it came about: what lies at constant distances from it is
// reached by immediates, not by sums of its own for each.
template <class T>
__device__ T* as_base(T* address) {
  asm("" : "+l"(address));
  return address;
}

// Leaves the machine to others for a moment: 32 nanoseconds, more or less.
__device__ inline void pause() { __nanosleep(32); }

// Adds without a result. (nvcc 13.0 makes of atomicAdd, whose result nobody reads, an ATOMG that returns one.)
__device__ inline void add_to_global(float* to, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

__device__ inline void store_release(int* to, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

}  // namespace flash_attn
