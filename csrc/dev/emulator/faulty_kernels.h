// For kernels with one fault each: what the emulator says of them.
#pragma once

#include <exception>
#include <string>

namespace flash_attn::emulator {

// Until the next call; "" if nothing was found.
template <class Run>
const char* said_of(const Run& run) {
  static std::string said;
  said.clear();
  try {
    run();
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}

}  // namespace flash_attn::emulator
