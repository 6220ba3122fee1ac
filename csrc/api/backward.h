// The backward ops, from checked tensors to launched kernels.
#pragma once

#include <string>

#include "api/backward_args.h"

namespace flash_attn {

struct BackwardResult {
  Gradients grads;
  Tensor ds_aux;  // (num_heads) in s_aux's dtype; float32 without elements where there are no sinks
};

// Launches on the current stream of q's device. Where `grads` are given the kernels write into them.
BackwardResult run_backward(const BackwardArgs& args, const std::optional<Gradients>& grads);

// The plan that run_backward would carry out for the gradient of a forward call, as JSON; reads no tensor's contents.
std::string explain_backward(const ForwardArgs& args);

}  // namespace flash_attn
