// The emulator's part of what C++ has no name for.
#pragma once

#include <cfloat>
#include <cmath>

#include "dev/emulator/memory_check.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn {

template <class T>
T& dynamic_smem() {
  return *static_cast<T*>(emulator::dynamic_smem());
}

inline float fast_exp2(float x) {
  const float result = std::exp2(x);
  return result < FLT_MIN ? 0.f : result;
}

inline float fast_reciprocal(float x) { return 1.f / x; }

inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

inline int load_acquire(const int* from) {
  emulator::poll();
  return emulator::memory::load_from_global(from);
}

template <class T>
T* as_base(T* address) {
  return address;
}

inline void pause() {}  // load_acquire counts

inline void add_to_global(float* to, float value) { emulator::memory::add_to_global(to, value); }

inline int fetch_and_increment(int* counter) { return emulator::memory::fetch_and_increment(counter); }

inline void store_release(int* to, int value) { emulator::memory::store_to_global(to, value); }

}  // namespace flash_attn
