// Merges the parts of rows whose keys were split over thread blocks.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/params.h"
#include "variant/variant.h"

namespace flash_attn {

// After a kernel that may split keys, whose tiles have `tile_m` rows; writes O and LSE of the entries that it split.
cudaError_t launch_merge_splits(const ForwardParams& params, Dtype dtype, int tile_m, cudaStream_t stream);

}  // namespace flash_attn
