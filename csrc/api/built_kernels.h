// What this build holds, for flash_attn._extension.
#pragma once

#include <string>

namespace flash_attn {

// The buckets that the tile tables hold and the kernels that were built, as JSON.
std::string built_kernels();

}  // namespace flash_attn
