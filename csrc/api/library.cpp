// The ops that the compiled module adds to torch.ops.flash_attn, and the module itself.
#include <Python.h>

#include "api/forward.h"

namespace flash_attn {
namespace {

using torch::stable::detail::from;

void boxed_forward(StableIValue* stack, uint64_t, uint64_t) {
  StackReader reader(stack);
  const ForwardResult result = run_forward(take_forward_args(reader), std::nullopt);
  stack[0] = from(result.out);
  stack[1] = from(result.lse);
}

void boxed_forward_out(StableIValue* stack, uint64_t, uint64_t) {
  StackReader reader(stack);
  const ForwardArgs args = take_forward_args(reader);
  stack[0] = from(run_forward(args, reader.take<Tensor>()).lse);
}

void boxed_explain_forward(StableIValue* stack, uint64_t, uint64_t) {
  StackReader reader(stack);
  stack[0] = from(explain_forward(take_forward_args(reader)));
}

}  // namespace
}  // namespace flash_attn

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn, library) {
  library.def("forward(" FLASH_ATTN_FORWARD_SCHEMA_ARGS ") -> (Tensor out, Tensor lse)");
  library.def("forward_out(" FLASH_ATTN_FORWARD_SCHEMA_ARGS ", Tensor(a!) out) -> Tensor lse");
  library.def("explain_forward(" FLASH_ATTN_FORWARD_SCHEMA_ARGS ") -> str");
  library.def("built_kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CUDA, library) {
  library.impl("forward", &flash_attn::boxed_forward);
  library.impl("forward_out", &flash_attn::boxed_forward_out);
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, library) {
  library.impl("explain_forward", &flash_attn::boxed_explain_forward);
  library.impl("built_kernels", TORCH_BOX(&flash_attn::built_kernels));
}

extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
