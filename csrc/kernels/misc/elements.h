// 16-bit and 32-bit elements, one or several side by side, for kernels that only move them or compute in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <type_traits>

namespace flash_attn {

namespace detail {

// What one instruction stores so many bytes from.
template <int kBytes>
using WordsOf =
    std::conditional_t<kBytes == 16, uint4,
                       std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

}  // namespace detail

// Moved in one instruction.
template <class Element, int kCount>
struct alignas(sizeof(Element) * kCount) ElementVector {
  Element at[kCount];
};

template <int kCount, class Element>
__device__ ElementVector<Element, kCount> load_vector(const Element* from) {
  return *reinterpret_cast<const ElementVector<Element, kCount>*>(from);
}

template <class Element, int kCount>
__device__ void store_vector(Element* to, const ElementVector<Element, kCount>& vector) {
  // nvcc 13.0 stores 16-bit elements that were computed one by one, unless it is given words.
  using Words = detail::WordsOf<sizeof(vector)>;
  *reinterpret_cast<Words*>(to) = std::bit_cast<Words>(vector);
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Element>
__device__ Element from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace flash_attn
