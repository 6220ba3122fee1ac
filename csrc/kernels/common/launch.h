// How the host reaches a kernel: a launch function per variant, and the generated table of those that were built.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/backward_params.h"
#include "kernels/common/params.h"
#include "variant/backward_tiles.h"

namespace flash_attn {

struct LaunchConfig {
  int num_blocks;
  cudaStream_t stream;
};

using ForwardLaunch = cudaError_t (*)(const ForwardParams&, const LaunchConfig&);

struct ForwardKernel {
  Variant variant;
  ForwardLaunch launch;
};

// The built kernels; defined in the file that variants.py generates.
struct ForwardKernels {
  const ForwardKernel* begin;
  const ForwardKernel* end;
};
ForwardKernels built_forward_kernels();

struct BackwardLaunchConfig {
  int num_key_blocks;    // of dK, dV and the sums of dQ
  int num_query_blocks;  // of dQ
  cudaStream_t stream;
};

using BackwardLaunch = cudaError_t (*)(const BackwardParams&, const BackwardLaunchConfig&);

struct BackwardKernel {
  BackwardVariant variant;
  BackwardLaunch launch;
};

struct BackwardKernels {
  const BackwardKernel* begin;
  const BackwardKernel* end;
};
BackwardKernels built_backward_kernels();

inline BackwardLaunch find_backward_kernel(const BackwardVariant& variant) {
  const BackwardKernels kernels = built_backward_kernels();
  for (const BackwardKernel* kernel = kernels.begin; kernel != kernels.end; ++kernel) {
    if (kernel->variant == variant) return kernel->launch;
  }
  return nullptr;
}

inline ForwardLaunch find_forward_kernel(const Variant& variant) {
  const ForwardKernels kernels = built_forward_kernels();
  for (const ForwardKernel* kernel = kernels.begin; kernel != kernels.end; ++kernel) {
    if (kernel->variant == variant) return kernel->launch;
  }
  return nullptr;
}

}  // namespace flash_attn
