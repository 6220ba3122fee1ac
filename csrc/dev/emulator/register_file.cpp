#include "dev/emulator/register_file.h"

#include <algorithm>
#include <string>
#include <vector>

#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {
namespace {

constexpr int kNumRegisters = 65536;
constexpr int kMaxPerThread = 255;
constexpr int kUnit = 8;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

int num_of_warp[kMaxWarps];  // of each of its threads

struct RegisterFile {
  int num_free;
  std::vector<int> waiting;
};

RegisterFile files[kMaxClusterBlocks];

int num_warps() { return static_cast<int>(block_dim.x) / kWarpSize; }

RegisterFile& file() { return files[block_of_cluster()]; }

int& own() { return num_of_warp[running_thread / kWarpSize]; }

void check_number(int num_registers) {
  if (num_registers % kUnit != 0 || num_registers < 24 || num_registers > 256) {
    fail("setmaxnreg takes multiples of 8 from 24 to 256, got " + std::to_string(num_registers));
  }
}

// The first lane of a warp acts for all of them.
bool acts() { return lane() == 0; }

}  // namespace

void begin_register_files() {
  const int at_start = std::min(kNumRegisters / static_cast<int>(block_dim.x), kMaxPerThread) / kUnit * kUnit;
  std::fill(std::begin(num_of_warp), std::end(num_of_warp), at_start);
  // What the launch did not give out nobody can take.
  for (RegisterFile& file : files) file = {.num_free = 0, .waiting = {}};
}

void give_up_registers_to(int num_registers) {
  check_number(num_registers);
  if (!acts()) return;
  if (num_registers > own()) fail("gives up registers to have more of them than before");
  file().num_free += (own() - num_registers) * kWarpSize;
  own() = num_registers;
  for (const int thread : file().waiting) wake(thread);
  file().waiting.clear();
}

void take_registers_up_to(int num_registers) {
  check_number(num_registers);
  if (!acts()) return;
  if (num_registers < own()) fail("takes registers to have fewer of them than before");
  while ((num_registers - own()) * kWarpSize > file().num_free) {
    file().waiting.push_back(running_thread);
    sleep("registers that others have");
  }
  file().num_free -= (num_registers - own()) * kWarpSize;
  own() = num_registers;
}

}  // namespace flash_attn::emulator
