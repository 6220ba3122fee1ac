// Division by a number that the host knows, without a division.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "variant/rounding.h"

namespace flash_attn {

// Device code calls these functions because they are constexpr (nvcc's --expt-relaxed-constexpr).
//
// Quotients of dividends from 0 to 2^31 - 1 by a multiplication with ceil(2^p / divisor), where 2^p is large enough for
// the rounding to vanish (Granlund and Montgomery: Division by invariant integers using multiplication; PLDI 1994).
class FastDivisor {
 public:
  FastDivisor() = default;

  constexpr explicit FastDivisor(int divisor) : divisor_(divisor) {
    if (divisor == 1) return;
    int log2 = 0;
    while ((int64_t{1} << log2) < divisor) ++log2;
    shift_ = log2 - 1;
    multiplier_ = static_cast<uint32_t>(ceil_div(uint64_t{1} << (32 + shift_), static_cast<uint64_t>(divisor)));
  }

  constexpr int divide(int dividend) const {
    if (divisor_ == 1) return dividend;
    return static_cast<int>((static_cast<uint64_t>(dividend) * multiplier_) >> 32) >> shift_;
  }

  constexpr int divisor() const { return divisor_; }

 private:
  int divisor_ = 1;
  int shift_ = 0;
  uint32_t multiplier_ = 0;
};

namespace detail {

constexpr bool divides_exactly(int divisor) {
  const FastDivisor fast(divisor);
  constexpr int kLargest = 2147483647;
  for (const int quotient : {0, 1, 2, 1000, kLargest / divisor}) {
    const int64_t multiple = int64_t{quotient} * divisor;
    for (const int64_t dividend : {multiple - 1, multiple, multiple + 1, multiple + divisor - 1}) {
      if (dividend < 0 || dividend > kLargest) continue;
      if (fast.divide(static_cast<int>(dividend)) != dividend / divisor) return false;
    }
  }
  return true;
}

static_assert(divides_exactly(1) && divides_exactly(2) && divides_exactly(3) && divides_exactly(5) &&
              divides_exactly(7) && divides_exactly(16) && divides_exactly(71) && divides_exactly(256) &&
              divides_exactly(641) && divides_exactly(65535) && divides_exactly(65537) && divides_exactly(1 << 30) &&
              divides_exactly((1 << 30) + 1) && divides_exactly(2147483647));

}  // namespace detail

}  // namespace flash_attn
