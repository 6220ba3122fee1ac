#include "kernels/sm90/tensor_map.h"

#include <cstdint>

#include "variant/tiles.h"

namespace flash_attn::sm90 {
namespace {

constexpr int kWideBoxBytes = 128;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's library is not named in this module's dependencies, so that the module loads where there is none.
EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr unsigned kFirstCudaThatHasIt = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kFirstCudaThatHasIt,
                                                             cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(function);
}

// The driver's functions, unlike the runtime's, don't give a thread that has none the context of its device. A thread
// that finds all its memory in torch's cache has called none of the runtime's.
CUresult bind_context() {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return static_cast<CUresult>(error == cudaSuccess ? cudaSetDevice(device) : error);
}

}  // namespace

cudaError_t encode_tensor_map(const TensorMapSpec& spec, Dtype dtype, TensorMap* map) {
  static const EncodeTiled encode_tiled = find_encode_tiled();
  if (encode_tiled == nullptr) return cudaErrorCallRequiresNewerDriver;
  const HeadAxis heads(spec.operand, spec.num_heads, spec.batch);
  // A dimension of one element may have any stride: that of neighbours.
  const auto stride_bytes = [&](int64_t stride, int64_t size) {
    return static_cast<cuuint64_t>(size > 1 ? stride : spec.head_dim) * kElementBytes;
  };
  const cuuint64_t row_bytes = stride_bytes(spec.operand.row_stride, spec.num_rows);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(spec.head_dim), static_cast<cuuint64_t>(heads.size), kRowBound,
                              static_cast<cuuint64_t>(spec.num_rows) + 1, kRowBound + 1};
  // kRowBound times this is 0 in 64 bits of address.
  constexpr cuuint64_t kWrappingStride = (cuuint64_t{1} << 34) * kElementBytes;
  const cuuint64_t strides[] = {stride_bytes(heads.stride, heads.size), row_bytes, row_bytes,
                                kWrappingStride - row_bytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(spec.box_cols), static_cast<cuuint32_t>(spec.box_heads),
                            static_cast<cuuint32_t>(spec.box_rows), 1, 1};
  const cuuint32_t every_element[] = {1, 1, 1, 1, 1};
  map->head_step = static_cast<int>(heads.head_step);
  map->entry_step = static_cast<int>(heads.entry_step);
  const auto encode = [&] {
    return encode_tiled(
        &map->descriptor, dtype == Dtype::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        static_cast<cuuint32_t>(sizeof(sizes) / sizeof(sizes[0])), spec.operand.ptr, sizes, strides, box, every_element,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        spec.box_cols * kElementBytes == kWideBoxBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    result = bind_context();
    if (result == CUDA_SUCCESS) result = encode();
  }
  return static_cast<cudaError_t>(result);  // the same numbers
}

}  // namespace flash_attn::sm90
