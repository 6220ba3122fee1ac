// What the translated PTX of a kernel (build_support/ptx.py) is made of: instructions that are more than a C++
// operator, in terms of the emulator's parts. Registers are unsigned integers of their width, as in PTX.
#pragma once

#include <cuda.h>

#include <array>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cutlass/bfloat16.h"
#include "cutlass/half.h"
#include "dev/emulator/async_copies.h"
#include "dev/emulator/barriers.h"
#include "dev/emulator/cluster.h"
#include "dev/emulator/kernels/common/instructions.h"
#include "dev/emulator/memory_check.h"
#include "dev/emulator/ordering.h"
#include "dev/emulator/register_file.h"
#include "dev/emulator/thread_block.h"
#include "dev/emulator/tma.h"
#include "dev/emulator/translated.h"
#include "dev/emulator/warp_instructions.h"
#include "dev/emulator/warpgroup_products.h"

namespace flash_attn::emulator::ptx {

template <size_t kBytes>
using Bits =
    std::conditional_t<kBytes == 1, uint8_t,
                       std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

// A register from its parts, the lowest first, and its parts.
template <class T, size_t kN>
auto whole_of(const std::array<T, kN>& parts) {
  return std::bit_cast<Bits<sizeof(T) * kN>>(parts);
}
template <size_t kN, class T>
auto parts_of(T whole) {
  return std::bit_cast<std::array<Bits<sizeof(T) / kN>, kN>>(whole);
}

// A register's value as a T, and a T as a register's.
template <class T, class Register>
T as(Register bits) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(bits));
  } else {
    return static_cast<T>(bits);
  }
}
template <class T>
auto bits_of(T value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value;
  } else if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<Bits<sizeof(T)>>(value);
  } else {
    return static_cast<Bits<sizeof(T)>>(value);
  }
}

// ---- memory. Accesses must be aligned to their whole width, as the hardware demands.

inline void check_alignment(const void* at, size_t num_bytes) {
  if (reinterpret_cast<uintptr_t>(at) % num_bytes != 0) fail("an access that is not aligned to its width");
}
template <class T, int kN>
std::array<T, kN> load(const void* from) {
  check_alignment(from, sizeof(T) * kN);
  memory::read(from, sizeof(T) * kN);
  std::array<T, kN> values;
  std::memcpy(values.data(), from, sizeof(values));
  return values;
}
template <class T, size_t kN>
void store(void* to, const std::array<T, kN>& values) {
  check_alignment(to, sizeof(values));
  memory::store(to, sizeof(values));
  std::memcpy(to, values.data(), sizeof(values));
}
// A kernel's parameters need no check.
template <class T, int kN>
std::array<T, kN> load_param(const void* from) {
  std::array<T, kN> values;
  std::memcpy(values.data(), from, sizeof(values));
  return values;
}
inline void* global(uint64_t address) { return reinterpret_cast<void*>(address); }
inline unsigned char* shared(uint32_t address) { return memory::smem() + address; }
inline uint64_t address_of(const void* at) { return reinterpret_cast<uint64_t>(at); }

// An address in the shared memory of a block of the cluster, whose number comes before it.
inline constexpr int kBlockShift = 24;
inline uint32_t cluster_address(uint32_t address, uint32_t block) { return block << kBlockShift | address; }
inline void arrive_in_cluster(uint32_t address) {
  arrive_at_mbarrier_of_block(shared(address & ((1u << kBlockShift) - 1)), static_cast<int>(address >> kBlockShift));
}

// ---- integers

template <class T>
T multiply_high(T a, T b) {
  using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                  std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (sizeof(T) * 8));
}
template <class T>
T divide(T a, T b) {
  if (b == 0) fail("an integer division by zero");
  return std::is_signed_v<T> && b == T(-1) ? -a : a / b;
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) fail("an integer division by zero");
  return std::is_signed_v<T> && b == T(-1) ? 0 : a % b;
}
template <class T>
T shift_left(T a, uint32_t by) {
  return by >= sizeof(T) * 8 ? 0 : static_cast<T>(a << by);
}
template <class T>
T shift_right(T a, uint32_t by) {
  constexpr uint32_t kWidth = sizeof(T) * 8;
  return a >> (by < kWidth ? by : kWidth - 1) >> (by < kWidth || std::is_signed_v<T> ? 0 : 1);
}
template <class T>
T insert_bits(T from, T into, uint32_t begin, uint32_t count) {
  begin &= 255;
  count &= 255;
  const T mask = count >= sizeof(T) * 8 ? ~T(0) : static_cast<T>((T(1) << count) - 1);
  return static_cast<T>((into & ~shift_left(mask, begin)) | shift_left<T>(from & mask, begin));
}
inline uint32_t reverse_bits(uint32_t x) {
  uint32_t reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
// bfind.shiftamt: by how much the highest bit would have to be shifted to come first.
inline uint32_t shift_of_highest_bit(uint32_t x) { return x == 0 ? ~0u : std::countl_zero(x); }

// ---- floating point

inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.f, x) : x; }
inline float reciprocal_flushing(float x) { return flushed(1.f / flushed(x)); }
inline float saturated(float x) { return std::isnan(x) ? 0.f : x < 0.f ? 0.f : x > 1.f ? 1.f : x; }
// The float next to an exact value on the side that a rounding mode asks for.
inline float round_down(double exact) {
  const float nearest = static_cast<float>(exact);
  return nearest > exact ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float round_to_zero(double exact) {
  const float nearest = static_cast<float>(exact);
  return std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.f) : nearest;
}
template <class Half>
uint16_t to_half(float x) {
  return Half(x).storage;
}
template <class Half>
float from_half(uint16_t bits) {
  return static_cast<float>(Half::bitcast(bits));
}
template <class Half>
uint32_t to_halves(float high, float low) {
  return static_cast<uint32_t>(to_half<Half>(high)) << 16 | to_half<Half>(low);
}

// ---- a warp

enum class Shuffle { kUp, kXor, kIdx };
// The value of the lane that `b` and `c` name, and whether there is one in this lane's segment.
inline std::array<uint32_t, 2> shuffle(Shuffle mode, uint32_t value, uint32_t b, uint32_t c, uint32_t lanes) {
  const int segment = static_cast<int>(c >> 8 & 31);
  const int limit = (lane() & segment) | (static_cast<int>(c & 31) & ~segment);
  const int by = static_cast<int>(b & 31);
  int from = 0;
  switch (mode) {
    case Shuffle::kUp:
      from = lane() - by;
      break;
    case Shuffle::kXor:
      from = lane() ^ by;
      break;
    case Shuffle::kIdx:
      from = (lane() & segment) | (by & ~segment);
      break;
  }
  const bool valid = mode == Shuffle::kUp ? from >= limit : from <= limit;
  return {show(lanes, value, valid ? from : lane()), valid};
}
template <MatrixOrder kOrder>
std::array<uint32_t, 4> load_four_matrices(const void* row) {
  check_alignment(row, 16);
  uint32_t own[4];
  load_matrices<kOrder>(row, own);
  return {own[0], own[1], own[2], own[3]};
}
inline void store_four_matrices(const std::array<uint32_t, 4>& own, void* row) {
  check_alignment(row, 16);
  const uint32_t matrices[4] = {own[0], own[1], own[2], own[3]};
  store_matrices(matrices, row);
}
template <class Element>
std::array<uint32_t, 4> multiply_accumulate(const std::array<uint32_t, 4>& a, const std::array<uint32_t, 2>& b,
                                            const std::array<uint32_t, 4>& sums) {
  MmaOperands operands{{a[0], a[1], a[2], a[3]},
                       {b[0], b[1]},
                       {as<float>(sums[0]), as<float>(sums[1]), as<float>(sums[2]), as<float>(sums[3])}};
  multiply_matrices<Element>(operands);
  return {bits_of(operands.sums[0]), bits_of(operands.sums[1]), bits_of(operands.sums[2]), bits_of(operands.sums[3])};
}

// The leader, and whether this lane is it.
inline std::array<uint32_t, 2> elect(uint32_t lanes) {
  const int leader = std::countr_zero(lanes);
  return {static_cast<uint32_t>(leader), lane() == leader};
}

// ---- a warpgroup. A product is done when the instruction returns, which is one of the times at which it may be; that
// its operands are left alone until then is what the emulated C++ shows.

template <class A, size_t kN>
std::array<uint32_t, kN> multiply_group(ProductElement element, const A& a, uint64_t b, Major b_major, bool accumulates,
                                        const std::array<uint32_t, kN>& sums) {
  auto acc = std::bit_cast<std::array<float, kN>>(sums);
  Product product{.element = element,
                  .n = static_cast<int>(kN) * 2,
                  .b = b,
                  .b_major = b_major,
                  .starts_at_zero = !accumulates,
                  .acc = acc.data()};
  if constexpr (std::is_same_v<A, uint64_t>) {
    product.a = a;
  } else {
    product.a_registers = a.data();
  }
  start_product(product);
  commit_products();
  wait_for_products(0);
  return std::bit_cast<std::array<uint32_t, kN>>(acc);
}

// ---- copies

inline void copy_async(void* smem, const void* from, uint32_t num_bytes, uint32_t num_read) {
  check_alignment(smem, kAsyncCopyBytes);
  if (num_read != 0) check_alignment(from, kAsyncCopyBytes);
  if (num_bytes != kAsyncCopyBytes || (num_read != 0 && num_read != num_bytes)) {
    fail("cp.async of another size than 16 bytes, all read or none");
  }
  start_async_copy(smem, from, num_read != 0);
}
inline void wait_until_stores_left(int num_groups) {
  if (num_groups != 0) fail("a wait for some of its stores");
  wait_for_box_stores();
}
inline uint32_t fetch_and_add(void* counter, int addend) {
  if (addend != 1) fail("an atomic addition of something else than 1");
  return memory::fetch_and_increment(static_cast<int*>(counter));
}
inline const CUtensorMap& tensor_map(uint64_t address) {
  check_alignment(global(address), 64);
  return *static_cast<const CUtensorMap*>(global(address));
}

}  // namespace flash_attn::emulator::ptx
