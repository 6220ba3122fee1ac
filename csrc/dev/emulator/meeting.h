// Threads that meet at a barrier, phase by phase.
#pragma once

#include <vector>

#include "dev/emulator/ordering.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {

struct Meeting {
  std::vector<int> waiting;
  ordering::Knowledge arrived;  // in the phase that is under way
  ordering::Knowledge passed;   // in those before

  void clear() {
    waiting.clear();
    arrived.clear();
    passed.clear();
  }
  // Whoever waits learns what those knew who came.
  void end_phase() {
    passed = arrived;
    arrived.clear();
    for (const int thread : waiting) {
      ordering::acquire(thread, passed);
      wake(thread);
    }
    waiting.clear();
  }
};

}  // namespace flash_attn::emulator
