#include "api/cuda_stream.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace flash_attn {
namespace {

using GetCurrentStream = decltype(&aoti_torch_get_current_cuda_stream);

// libtorch_cuda is not named in this module's dependencies, so that the module loads under a torch without CUDA too. A
// torch with CUDA has loaded it before the first CUDA tensor exists.
GetCurrentStream find_get_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  check(library != nullptr, "this torch was built without CUDA");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  check(symbol != nullptr, "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<GetCurrentStream>(symbol);
}

}  // namespace

cudaStream_t current_stream(const Tensor& tensor) {
  static const GetCurrentStream get_current_stream = find_get_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_current_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace flash_attn
