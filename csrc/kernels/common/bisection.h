// Finding a batch entry by where it begins.
#pragma once

#include <cuda_runtime.h>

namespace flash_attn {

// The last entry of [0, batch] for which `begins(entry)` holds, or 0. It holds up to some entry and for none after it.
template <class Begins>
__device__ int last_entry(int batch, const Begins& begins) {
  int low = 0;
  int high = batch;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (begins(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace flash_attn
