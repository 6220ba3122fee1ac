// Runs a kernel's thread blocks on the CPU, one after the other, those of a cluster together: each thread is a fiber
// that runs until it has to wait.
#pragma once

#include <vector_types.h>

#include <functional>
#include <string>
#include <type_traits>

namespace flash_attn::emulator {

extern uint3 thread_idx;
extern uint3 block_idx;
extern dim3 block_dim;
extern dim3 grid_dim;

inline constexpr int kMaxThreads = 1024;  // of a block, or of a cluster's blocks together
inline constexpr int kMaxClusterBlocks = 2;
inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = ~0u;

struct Launch {
  int num_blocks;
  int num_threads;
  int smem_bytes;
  int cluster_blocks = 1;
};

// Throws std::runtime_error where a thread did what it must not do.
void run_blocks(const Launch& launch, const std::function<void()>& thread);

// The running thread's place among those of its cluster, whose blocks come one after the other: by it the emulator
// tells threads apart, and warps by it over kWarpSize.
extern int running_thread;
inline int block_of(int thread) {
  static_assert(kMaxClusterBlocks == 2, "what follows is called for every access, and a division is slow");
  return thread < static_cast<int>(block_dim.x) ? 0 : 1;
}
// The running thread's block among those of its cluster, and how many those are.
inline int block_of_cluster() { return block_of(running_thread); }
int num_cluster_blocks();
// Whether all threads of one of the cluster's blocks have returned.
bool has_left(int block);

// The running thread block's dynamic shared memory.
void* dynamic_smem();

// `work` happens by itself some time later, between any two steps of the cluster's threads.
void happen_later(std::function<void()> work);

// A thread that sleeps may go on.
void wake(int thread);

// What follows is called by the running thread.

// Ends the launch; run_blocks throws what is wrong.
[[noreturn]] void fail(const std::string& what);

// Waits for all threads of the block that have not returned.
void sync_block();

// Waits until it is woken; `waits_for` says for what, where that never comes.
void sleep(const std::string& waits_for);

inline int lane() { return thread_idx.x % kWarpSize; }

// What each lane of a warp has to show the others, by lane.
using Shown = void* const*;

// Waits for these lanes of the warp. The last to come runs `step` for all of them.
void meet(unsigned lanes, void* own, void (*step)(unsigned lanes, Shown shown));

// The same where a lane shows a T: calls step(lanes, lane_of) with lane_of(lane) the lane's.
template <class T, class Step>
void meet_with(unsigned lanes, T& own, Step) {
  meet(lanes, &own, [](unsigned lanes, Shown shown) {
    Step{}(lanes, [shown](int lane) -> T& { return *static_cast<T*>(shown[lane]); });
  });
}

// Waits for these lanes; what they wrote to shared memory is then there for each other.
void sync_warp(unsigned lanes);

// Before a read in a loop that waits for another thread block.
void poll();

}  // namespace flash_attn::emulator
