// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include "api/tensors.h"

namespace flash_attn {

// `parts` say what failed. The runtime, which is linked into this module, keeps an error until it is asked for it: left
// there, it would be taken for one of the next call.
template <class... Parts>
void check_cuda(cudaError_t error, const Parts&... parts) {
  if (error == cudaSuccess) [[likely]]
    return;
  static_cast<void>(cudaGetLastError());
  check(false, parts..., " failed: ", cudaGetErrorString(error));
}

}  // namespace flash_attn
