// ForwardArgs -> Problem: the checks that stand between torch.ops.flash_attn.forward and memory.
#pragma once

#include "api/forward_args.h"
#include "plan/problem.h"

namespace flash_attn {

Problem make_problem(const ForwardArgs& args);

}  // namespace flash_attn
