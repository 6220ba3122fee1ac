// How the host reaches a kernel: a launch function per variant, and the generated table of those that were built.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <span>

#include "kernels/common/backward_params.h"
#include "kernels/common/params.h"
#include "variant/backward_tiles.h"

namespace flash_attn {

// Lets one kernel have more dynamic shared memory than the 48 KB that every launch may have. CUDA is asked once per
// device: once per launch would take a tenth of a small call's time (measured with an H200).
class SmemOptIn {
 public:
  static constexpr int kWithoutOptIn = 48 * 1024;

  cudaError_t apply(const void* kernel, int bytes) {
    if (bytes <= kWithoutOptIn) return cudaSuccess;
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    // Devices past the word's bits are asked every time.
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (devices_.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) devices_.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

 private:
  std::atomic<uint64_t> devices_{0};
};

struct ForwardLaunchConfig {
  int num_blocks;
  int cluster_blocks;  // of each cluster, as the planner counted them
  int num_sms;
  int* tile_counter;  // for SM90's kernels where lengths are on the device, or null
  cudaStream_t stream;
};

using ForwardLaunch = cudaError_t (*)(const ForwardParams&, const ForwardLaunchConfig&);

struct ForwardKernel {
  Variant variant;
  ForwardLaunch launch;
};

// The built kernels; defined in the file that variants.py generates.
std::span<const ForwardKernel> built_forward_kernels();

struct BackwardLaunchConfig {
  int num_key_blocks;    // of backward_kernel: dK, dV and the sums of dQ
  int num_query_blocks;  // of store_dq_kernel
  cudaStream_t stream;
};

using BackwardLaunch = cudaError_t (*)(const BackwardParams&, const BackwardLaunchConfig&);

struct BackwardKernel {
  BackwardVariant variant;
  BackwardLaunch launch;
};

std::span<const BackwardKernel> built_backward_kernels();

// nullptr where the variant is not in this build.
inline ForwardLaunch find_forward_kernel(const Variant& variant) {
  for (const ForwardKernel& kernel : built_forward_kernels()) {
    if (kernel.variant == variant) return kernel.launch;
  }
  return nullptr;
}

inline BackwardLaunch find_backward_kernel(const BackwardVariant& variant) {
  for (const BackwardKernel& kernel : built_backward_kernels()) {
    if (kernel.variant == variant) return kernel.launch;
  }
  return nullptr;
}

}  // namespace flash_attn
