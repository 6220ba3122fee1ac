// Quotients and multiples, rounded up. Device code calls these functions because they are constexpr (nvcc's
// --expt-relaxed-constexpr); they compute in the type of their arguments' sum.
#pragma once

namespace flash_attn {

template <class A, class B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

template <class A, class B>
constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

}  // namespace flash_attn
