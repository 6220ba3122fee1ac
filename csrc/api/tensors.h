// Checks and conversions between libtorch's stable tensors and the plain structs of the layers below.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "kernels/common/head_axis.h"
#include "kernels/common/params.h"
#include "variant/tiles.h"

namespace flash_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python sees as a RuntimeError. The Python interface has checked its arguments before; these checks are
// the last line in front of memory, for callers of torch.ops.flash_attn. `parts` are evaluated in any case and
// formatted only on failure: what takes time to format is a type with an operator<<, such as Shape.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  message << "flash_attn: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// A tensor's shape as a part of a message.
struct Shape {
  const Tensor& tensor;

  friend std::ostream& operator<<(std::ostream& text, const Shape& shape) {
    text << "(";
    for (int64_t i = 0; i < shape.tensor.dim(); ++i) text << (i > 0 ? ", " : "") << shape.tensor.size(i);
    return text << ")";
  }
};

inline Shape shape_of(const Tensor& tensor) { return {tensor}; }

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline const int* int_pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int*>(tensor->const_data_ptr()) : nullptr;
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  if (std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) return;
  std::ostringstream expected;
  for (const int64_t size : shape) expected << (expected.tellp() > 0 ? ", " : "") << size;
  check(false, name, " must have shape (", expected.str(), "), got ", shape_of(tensor));
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype) {
  check(tensor.device() == like.device(), name, " must be on the device of the other tensors");
  check(tensor.scalar_type() == dtype, name, " must have dtype ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

// Checks a vector of int32, where it is given.
inline void check_ints(const char* name, const std::optional<Tensor>& vector, const Tensor& like, int64_t size) {
  if (!vector) return;
  check_like(name, *vector, like, ScalarType::Int);
  check_shape(name, *vector, {size});
  check(vector->is_contiguous(), name, " must be contiguous");
}

inline Dtype dtype_of(const Tensor& q) {
  const ScalarType dtype = q.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "q must be float16 or bfloat16");
  return dtype == ScalarType::Half ? Dtype::kFp16 : Dtype::kBf16;
}

// Sizes and strides are taken as a whole, here and below: each question to a tensor is a call into libtorch.
inline bool has_vector_rows(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const size_t last = sizes.size() - 1;
  if (sizes[last] % kVectorElements != 0 || strides[last] != 1) return false;
  for (size_t dim = 0; dim < last; ++dim) {
    if (sizes[dim] > 1 && strides[dim] % kVectorElements != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes == 0;
}

// Where a tensor of 16-bit elements lies: from its first element to behind its last one, and how many there are in
// between, each counted once.
class Extent {
 public:
  explicit Extent(const Tensor& tensor) : begin_(reinterpret_cast<uintptr_t>(tensor.data_ptr())) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      span_ += (sizes[dim] - 1) * strides[dim];
      if (strides[dim] != 0 || sizes[dim] == 0) count_ *= sizes[dim];
    }
  }

  // Whether the two share memory for certain: they begin at the same element, or neither leaves any out between its
  // first and its last one. Views that interleave may share nothing.
  bool surely_overlaps(const Extent& other) const {
    if (count_ == 0 || other.count_ == 0) return false;
    if (begin_ == other.begin_) return true;
    return begin_ < other.end() && other.begin_ < end() && span_ == count_ && other.span_ == other.count_;
  }

 private:
  uintptr_t end() const { return begin_ + span_ * kElementBytes; }

  uintptr_t begin_;
  int64_t span_ = 1;
  int64_t count_ = 1;
};

enum class OperandRole { kQueries, kKeys };

// An uninitialised contiguous tensor on `like`'s device. torch::stable::new_empty looks its op up by name each time,
// which takes longer than the allocation.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t dim = shape.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(shape[dim], 1);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  // libtorch's number of the dtype, which need not be the headers'.
  const auto dtype_id = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype_id, device_type,
                               like.get_device_index(), &handle);
  // libtorch has put the reason on stderr and not into the error. Trainers look for the words `CUDA out of memory.`
  check(error == AOTI_TORCH_SUCCESS, "flash_attn could not allocate ", stride, " elements of dtype ",
        torch::headeronly::toString(dtype), ", most likely for this reason: CUDA out of memory.");
  return Tensor(handle);
}

inline Tensor allocate_like(const Tensor& like, const std::vector<int64_t>& shape) {
  return allocate(like, shape, like.scalar_type());
}

// Dense (batch, row, head, head_dim) or variable-length (row, head, head_dim).
// A single row's stride may be anything, and rows past the end have addresses, which nothing is read from.
inline Operand operand_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const bool dense = strides.size() == 4;
  const size_t row_dim = dense ? 1 : 0;
  return {.ptr = tensor.data_ptr(),
          .batch_stride = dense ? strides[0] : 0,
          .row_stride = sizes[row_dim] > 1 ? strides[row_dim] : 0,
          .head_stride = strides[row_dim + 1]};
}

// Whether the forward kernels of an architecture take a tensor as it is. All need rows of whole vectors. TMA's
// descriptors want rows that lie less than 2^34 elements apart, heads less than 2^40 bytes, and neither at the same
// place; a batch, and the heads of keys, may be broadcast. Heads of queries may share a box, in which one follows the
// other.
inline bool can_be_operand(const Tensor& tensor, OperandRole role, Arch arch) {
  if (!has_vector_rows(tensor)) return false;
  if (arch != Arch::kSm90) return true;
  constexpr int64_t kRowStrideLimit = int64_t{1} << 34;
  constexpr int64_t kHeadStrideLimit = (int64_t{1} << 40) / kElementBytes;
  const auto sizes = tensor.sizes();
  const size_t row_dim = sizes.size() - 3;
  const int64_t num_heads = sizes[row_dim + 1];
  const Operand operand = operand_of(tensor);
  const HeadAxis heads(operand, num_heads, row_dim > 0 ? sizes[0] : 1);
  if (sizes[row_dim] > 1 && (operand.row_stride == 0 || operand.row_stride >= kRowStrideLimit)) return false;
  if (role == OperandRole::kQueries && num_heads > 1 && heads.head_step != 1) return false;
  return heads.stride < kHeadStrideLimit && heads.can_be_counted();
}

}  // namespace flash_attn
