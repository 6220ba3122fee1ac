// The forward ops, from checked tensors to a launched kernel.
#pragma once

#include <string>

#include "api/forward_args.h"

namespace flash_attn {

struct ForwardResult {
  Tensor out;
  Tensor lse;
};

// Launches on the current stream of q's device. Where `out` is given the kernel writes into it.
ForwardResult run_forward(const ForwardArgs& args, const std::optional<Tensor>& out);

// The plan that run_forward would carry out, as JSON; reads no tensor's contents and needs no GPU.
std::string explain_forward(const ForwardArgs& args);

}  // namespace flash_attn
