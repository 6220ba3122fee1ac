// What the planners count alike.
#pragma once

#include <cstdint>
#include <string>

#include "plan/problem.h"

namespace flash_attn {

// Tiles of one head of one dense entry, or of all packed entries.
int64_t count_tiles(Layout layout, int64_t rows, int64_t batch, int tile_rows);

// Throws UnsupportedProblem, which names the argument that makes so many, where a launch cannot have them.
void check_num_blocks(const char* name, int64_t num_blocks);

// Throws UnsupportedProblem: no `what` for these head dims in that much shared memory.
[[noreturn]] void refuse_head_dims(const Problem& problem, Arch arch, const std::string& what, int smem_limit);

}  // namespace flash_attn
