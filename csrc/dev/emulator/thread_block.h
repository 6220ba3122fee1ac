// Runs a kernel's thread blocks on the CPU, one after the other: each thread is a fiber that runs until it has to wait.
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

// Throws std::runtime_error where a thread did what it must not do.
void run_blocks(int num_blocks, int num_threads, int smem_bytes, const std::function<void()>& thread);

// The running thread block's dynamic shared memory.
void* dynamic_smem();

// `work` happens by itself some time later, between any two steps of the block's threads.
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

inline constexpr int kMaxThreads = 1024;
inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = ~0u;

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
