// The current CUDA stream of a device, without linking libtorch_cuda.
#pragma once

#include <cuda_runtime.h>

#include "api/tensors.h"

namespace flash_attn {

cudaStream_t current_stream(const Tensor& tensor);

}  // namespace flash_attn
