// How the host reaches a kernel: a launch function per variant, and the generated table of those that were built.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/params.h"
#include "variant/variant.h"

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

inline ForwardLaunch find_forward_kernel(const Variant& variant) {
  const ForwardKernels kernels = built_forward_kernels();
  for (const ForwardKernel* kernel = kernels.begin; kernel != kernels.end; ++kernel) {
    if (kernel->variant == variant) return kernel->launch;
  }
  return nullptr;
}

}  // namespace flash_attn
