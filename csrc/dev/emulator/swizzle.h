// Where a byte of a swizzled tile lies in shared memory.
#pragma once

#include <cstdint>

namespace flash_attn::emulator {

// By the width of its rows in bytes: their pieces of 16 bytes are exchanged by the number of the row.
enum class Swizzle : uint32_t { k64 = 64, k128 = 128 };

// Tiles repeat after so many bytes, to which they are aligned.
constexpr uint32_t period_of(Swizzle swizzle) { return static_cast<uint32_t>(swizzle) * 8; }

constexpr uint32_t swizzled(uint32_t offset, Swizzle swizzle) {
  constexpr uint32_t kPieceBytes = 16;
  const uint32_t pieces = static_cast<uint32_t>(swizzle) - kPieceBytes;
  return offset ^ ((offset >> 3) & pieces);
}

}  // namespace flash_attn::emulator
