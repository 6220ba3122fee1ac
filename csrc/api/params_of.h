// From checked arguments to what every kernel is told: the parts of the params that forward and backward share.
#pragma once

#include <vector>

#include "api/forward_args.h"
#include "kernels/common/params.h"
#include "plan/plan.h"
#include "plan/problem.h"

namespace flash_attn {

// The kernels read and write rows in pieces of 16 bytes.
int64_t round_up_to_vector(int64_t head_dim);

// The tensor itself where the kernels can read it, else a copy that they can: rows contiguous, 16-byte aligned, and
// their length a multiple of 16 bytes.
Tensor with_vector_rows(const Tensor& tensor);
// The same for an operand of this architecture's forward kernels.
Tensor as_operand(const char* name, const Tensor& tensor, OperandRole role, Arch arch);

// Where a kernel writes: the tensor that the caller gets, unless this architecture's kernels can't write it as it is.
struct OutputTarget {
  Tensor written;
  Tensor returned;

  void finish();
};

OutputTarget output_target_of(const Tensor& returned, Arch arch);

// (batch, head, row), or (head, row) where the queries are packed.
std::vector<int64_t> lse_shape_of(const Problem& problem);
LseOperand lse_operand_of(const Tensor& lse);
SeqParams seq_params_of(const ForwardArgs& args, const Problem& problem);
PageParams page_params_of(const ForwardArgs& args);
HeadParams head_params_of(const Problem& problem);
WindowParams window_params_of(const Problem& problem);
ScoreParams score_params_of(const ForwardArgs& args);
DropoutParams dropout_params_of(const ForwardArgs& args);

// Bytes of shared memory that a thread block can have on the tensor's device.
int smem_limit_of(const Tensor& tensor);

Gpu gpu_of(const Tensor& tensor);

Arch arch_of(int64_t arch);

}  // namespace flash_attn
