// The memory of CPU tensors while kernels are emulated: each tensor lies alone in a wide gap and is never where another
// was, so that an access that leaves it, or comes after its end, is known for what it is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flash_attn::emulator::tensor_memory {

// Whether the address is one that only tensors have.
bool holds(uintptr_t address);

// Whether the bytes are part of one tensor's storage, or of memory that is no tensor's.
bool may_touch(uintptr_t begin, size_t num_bytes);

}  // namespace flash_attn::emulator::tensor_memory
