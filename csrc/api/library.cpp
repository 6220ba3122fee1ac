// The ops that the compiled module adds to torch.ops.flash_attn, and the module itself.
#include <Python.h>

#include "api/attn_probs.h"
#include "api/backward.h"
#include "api/built_kernels.h"
#include "api/combine.h"
#include "api/forward.h"
#include "api/kvcache.h"

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

void boxed_backward(StableIValue* stack, uint64_t, uint64_t) {
  StackReader reader(stack);
  const BackwardResult result = run_backward(take_backward_args(reader), std::nullopt);
  stack[0] = from(result.grads.dq);
  stack[1] = from(result.grads.dk);
  stack[2] = from(result.grads.dv);
  stack[3] = from(result.ds_aux);
}

void boxed_backward_out(StableIValue* stack, uint64_t, uint64_t) {
  StackReader reader(stack);
  const BackwardArgs args = take_backward_args(reader);
  const Gradients grads{.dq = reader.take<Tensor>(), .dk = reader.take<Tensor>(), .dv = reader.take<Tensor>()};
  stack[0] = from(run_backward(args, grads).ds_aux);
}

void boxed_explain_backward(StableIValue* stack, uint64_t, uint64_t) {
  StackReader reader(stack);
  stack[0] = from(explain_backward(take_forward_args(reader)));
}

void boxed_attn_probs(StableIValue* stack, uint64_t, uint64_t) {
  StackReader reader(stack);
  stack[0] = from(attn_probs(take_attn_probs_args(reader)));
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
  library.def("backward(" FLASH_ATTN_BACKWARD_SCHEMA_ARGS ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor ds_aux)");
  library.def("backward_out(" FLASH_ATTN_BACKWARD_SCHEMA_ARGS
              ", Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> Tensor ds_aux");
  library.def("explain_backward(" FLASH_ATTN_FORWARD_SCHEMA_ARGS ") -> str");
  library.def("explain_forward(" FLASH_ATTN_FORWARD_SCHEMA_ARGS ") -> str");
  library.def("attn_probs" FLASH_ATTN_ATTN_PROBS_SCHEMA);
  library.def("append_kv" FLASH_ATTN_APPEND_KV_SCHEMA);
  library.def("rotary" FLASH_ATTN_ROTARY_SCHEMA);
  library.def("combine" FLASH_ATTN_COMBINE_SCHEMA);
  library.def("built_kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CUDA, library) {
  library.impl("forward", &flash_attn::boxed_forward);
  library.impl("forward_out", &flash_attn::boxed_forward_out);
  library.impl("backward", &flash_attn::boxed_backward);
  library.impl("backward_out", &flash_attn::boxed_backward_out);
  library.impl("attn_probs", &flash_attn::boxed_attn_probs);
  library.impl("append_kv", TORCH_BOX(&flash_attn::append_kv));
  library.impl("rotary", TORCH_BOX(&flash_attn::rotary));
  library.impl("combine", TORCH_BOX(&flash_attn::combine));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, library) {
  library.impl("explain_forward", &flash_attn::boxed_explain_forward);
  library.impl("explain_backward", &flash_attn::boxed_explain_backward);
  library.impl("built_kernels", TORCH_BOX(&flash_attn::built_kernels));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
