// Checks and conversions between libtorch's stable tensors and the plain structs of the layers below.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/common/params.h"
#include "variant/tiles.h"

namespace flash_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python sees as a RuntimeError. The Python interface has checked its arguments before; these checks are
// the last line in front of memory, for callers of torch.ops.flash_attn.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "flash_attn: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) equal = equal && tensor.size(dim++) == size;
  if (equal) return;
  std::ostringstream expected;
  for (const int64_t size : shape) expected << (expected.tellp() > 0 ? ", " : "") << size;
  check(false, name, " must have shape (", expected.str(), "), got ", shape_of(tensor));
}

inline Dtype dtype_of(const Tensor& q) {
  const ScalarType dtype = q.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "q must be float16 or bfloat16");
  return dtype == ScalarType::Half ? Dtype::kFp16 : Dtype::kBf16;
}

// The kernels read and write rows in pieces of 16 bytes.
inline constexpr int64_t kVectorBytes = 16;
inline constexpr int64_t kVectorElements = kVectorBytes / kElementBytes;

inline bool has_vector_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) % kVectorElements != 0 || tensor.stride(last) != 1) return false;
  for (int64_t dim = 0; dim < last; ++dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) % kVectorElements != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes == 0;
}

// Dense (batch, row, head, head_dim) or variable-length (row, head, head_dim).
inline Operand operand_of(const Tensor& tensor) {
  const bool dense = tensor.dim() == 4;
  const int64_t row_dim = dense ? 1 : 0;
  return {.ptr = tensor.data_ptr(),
          .batch_stride = dense ? tensor.stride(0) : 0,
          .row_stride = tensor.stride(row_dim),
          .head_stride = tensor.stride(row_dim + 1)};
}

}  // namespace flash_attn
