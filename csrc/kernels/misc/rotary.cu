#include "kernels/common/start_kernel.h"
#include "kernels/misc/rotary.h"
#include "kernels/misc/token_launch.h"

namespace flash_attn {
namespace {

// One thread block per token. Tokens of no entry, and those whose position the tables don't have, stay as they are.
template <class Element, int kColumns>
__global__ void __launch_bounds__(kTokenThreads)
    rotary_kernel(const __grid_constant__ RotateParams params, int64_t num_tokens) {
  for (int64_t idx = blockIdx.x; idx < num_tokens; idx += gridDim.x) {
    const TokenCoord token = locate_token(params.tokens, idx);
    const int64_t steps = params.positions == RotaryPositions::kSuccessive ? token.row : 0;
    const int64_t position = token.entry < 0 ? -1 : params.offsets[token.entry] + steps;
    const bool rotates = has_position(params.rotary, position);
    for_each_piece<kColumns>(params.num_heads, params.head_dim, [&](int head_idx, int column) {
      const auto from = row_of<Element>(params.x, token.source_batch_idx, token.source_row, head_idx);
      const auto to = row_of<Element>(params.out, token.source_batch_idx, token.source_row, head_idx);
      store_vector(to.at(column), rotates ? rotated<kColumns>(from, column, params.rotary, position)
                                          : load_vector<kColumns>(from.at(column)));
    });
  }
}

}  // namespace

cudaError_t launch_rotary(const RotateParams& params, Dtype dtype, TokenAccess access, cudaStream_t stream) {
  return launch_over_tokens(params.tokens.num_tokens(), dtype, access, [&](auto element, auto columns, int num_blocks) {
    start_kernel(&rotary_kernel<decltype(element), columns>, {num_blocks, kTokenThreads, 0, stream}, params,
                 params.tokens.num_tokens());
  });
}

}  // namespace flash_attn
