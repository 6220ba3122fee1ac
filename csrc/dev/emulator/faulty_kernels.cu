// Kernels with one fault each, for a test of whether the emulator finds it.
#include <cstring>

#include "dev/emulator/faulty_kernels.h"
#include "dev/emulator/thread_block.h"
#include "kernels/common/instructions.h"
#include "kernels/sm80/instructions.h"

namespace flash_attn {
namespace {

constexpr int kNumBlocks = 3;  // where blocks are to disturb each other: the emulator runs two at a time
constexpr int kNumThreads = 64;
constexpr int kFloatsPerCopy = 4;

struct Storage {
  alignas(16) float values[kNumThreads * kFloatsPerCopy];
};

void start_copy(const float* from) {
  const auto* source = reinterpret_cast<const cute::uint128_t*>(from);
  auto* target = reinterpret_cast<cute::uint128_t*>(dynamic_smem<Storage>().values);
  sm80::AsyncCopy::copy(source[0], target[threadIdx.x], true);
  sm80::cp_async_fence();
}

float& own_value() { return dynamic_smem<Storage>().values[threadIdx.x]; }
float& other_value() { return dynamic_smem<Storage>().values[kNumThreads - 1 - threadIdx.x]; }

void read_unwritten(float* out) { out[threadIdx.x] = own_value(); }

void read_without_barrier(float* out) {
  own_value() = 1.f;
  out[threadIdx.x] = other_value();
}

void write_without_barrier(float* out) {
  own_value() = 1.f;
  __syncthreads();
  out[threadIdx.x] = other_value();
  own_value() = 2.f;
}

void write_what_a_lane_disagrees_with(float* out) {
  dynamic_smem<Storage>().values[threadIdx.x / 2] = threadIdx.x;
  out[threadIdx.x] = 0.f;
}

void copy_to_where_a_lane_copies(float* out) {
  const auto* source = reinterpret_cast<const cute::uint128_t*>(out);
  auto* target = reinterpret_cast<cute::uint128_t*>(dynamic_smem<Storage>().values);
  sm80::AsyncCopy::copy(source[0], target[threadIdx.x / 2], true);
}

void read_without_wait(float* out) {
  start_copy(out);
  __syncthreads();
  out[threadIdx.x] = own_value();
}

void read_without_barrier_after_wait(float* out) {
  start_copy(out);
  sm80::cp_async_wait<0>();
  out[threadIdx.x] = other_value();
}

void read_past_tensor(float* out) { own_value() = out[threadIdx.x + 1]; }
void write_past_tensor(float* out) { out[threadIdx.x + 1] = 0.f; }
void copy_past_tensor(float* out) { start_copy(out + kNumThreads); }
void write_past_shared_memory(float*) { (&dynamic_smem<Storage>())[1].values[threadIdx.x] = 0.f; }

void write_what_another_block_writes(float* out) { out[threadIdx.x] = 0.f; }
void read_what_another_block_writes(float* out) {
  if (threadIdx.x > 0) return;
  out[1 + blockIdx.x] = out[blockIdx.x];
}

void write_what_a_later_block_reads(float* out) {
  const float read = out[1 - blockIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = read;
}

void shuffle_with_a_lane_that_left(float* out) {
  if (threadIdx.x == 0) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
}

void wait_for_a_later_block(float* out) {
  auto* const turn = reinterpret_cast<int*>(out);
  if (blockIdx.x == kNumBlocks - 1) return store_release(turn, 1);
  while (load_acquire(turn) != 1) {
  }
}

struct FaultyKernel {
  const char* name;
  void (*kernel)(float*);
  int num_blocks = 1;
};

constexpr FaultyKernel kFaultyKernels[] = {
    {"read_unwritten", &read_unwritten},
    {"read_without_barrier", &read_without_barrier},
    {"write_without_barrier", &write_without_barrier},
    {"write_what_a_lane_disagrees_with", &write_what_a_lane_disagrees_with},
    {"copy_to_where_a_lane_copies", &copy_to_where_a_lane_copies},
    {"read_without_wait", &read_without_wait},
    {"read_without_barrier_after_wait", &read_without_barrier_after_wait},
    {"read_past_tensor", &read_past_tensor},
    {"write_past_tensor", &write_past_tensor},
    {"copy_past_tensor", &copy_past_tensor},
    {"write_past_shared_memory", &write_past_shared_memory},
    {"write_what_another_block_writes", &write_what_another_block_writes, kNumBlocks},
    {"read_what_another_block_writes", &read_what_another_block_writes, kNumBlocks},
    {"write_what_a_later_block_reads", &write_what_a_later_block_reads, 2},
    {"shuffle_with_a_lane_that_left", &shuffle_with_a_lane_that_left},
    {"wait_for_a_later_block", &wait_for_a_later_block, kNumBlocks},
};

}  // namespace
}  // namespace flash_attn

// What the emulator said, or "" if it found nothing. `out` is a tensor of kNumThreads floats.
extern "C" const char* flash_attn_run_faulty_kernel(const char* name, float* out) {
  using namespace flash_attn;
  for (const FaultyKernel& faulty : kFaultyKernels) {
    if (std::strcmp(faulty.name, name) != 0) continue;
    return emulator::said_of(
        [&] { emulator::run_blocks({faulty.num_blocks, kNumThreads, sizeof(Storage)}, [&] { faulty.kernel(out); }); });
  }
  return "there is no such kernel";
}
