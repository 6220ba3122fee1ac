// What the host's code asks of CUDA and of torch's CUDA part.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <cstring>

#include "api/cuda_stream.h"
#include "dev/emulator/memory_check.h"
#include "dev/emulator/tma.h"

namespace {

constexpr int kNumSms = 4;  // few, so that small calls have some with several thread blocks

// What a thread block can have.
int max_smem_bytes() {
  const char* kilobytes = std::getenv("FLASH_ATTN_EMULATOR_SMEM_KB");
  return kilobytes == nullptr ? flash_attn::emulator::memory::kMaxSmemBytes : std::atoi(kilobytes) * 1024;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
  flash_attn::emulator::has_context = true;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = max_smem_bytes();
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = kNumSms;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t) {
  std::memset(to, byte, count);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool is_smem = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  return is_smem && value > max_smem_bytes() ? cudaErrorInvalidValue : cudaSuccess;
}
// The kernels ask for one function of the driver.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&flash_attn::emulator::encode_tiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error that the emulator can't have"; }

// There is no device to switch to, and no guard of it.
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

// Memory of the host's own code is not zero by luck: it holds NaN, -1, until something is written.
AOTITorchError aoti_torch_empty_strided(int64_t num_dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_idx, AtenTensorHandle* tensor) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  static const auto allocate =
      reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(torch, "aoti_torch_empty_strided"));
  const AOTITorchError error = allocate(num_dims, sizes, strides, dtype, device_type, device_idx, tensor);
  void* memory = nullptr;
  int64_t num_bytes = 0;
  if (error != AOTI_TORCH_SUCCESS || aoti_torch_get_data_ptr(*tensor, &memory) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_storage_size(*tensor, &num_bytes) != AOTI_TORCH_SUCCESS) {
    return AOTI_TORCH_FAILURE;
  }
  constexpr int kAllBits = 0xFF;
  std::memset(memory, kAllBits, num_bytes);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

namespace flash_attn {

cudaStream_t current_stream(const Tensor&) { return nullptr; }

}  // namespace flash_attn
