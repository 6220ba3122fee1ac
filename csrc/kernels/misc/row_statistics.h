// Before the main backward kernel: what it needs of each query row, and the gradient of the sinks, which needs no more.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/backward_params.h"
#include "variant/variant.h"

namespace flash_attn {

// Writes params.rows.lse_log2 and delta, and ds_aux where there are sinks.
cudaError_t launch_row_statistics(const BackwardParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace flash_attn
