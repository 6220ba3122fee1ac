// Which accesses of a cluster's thread blocks came before which others because a barrier says so, whatever the order in
// which its threads ran. Each thread knows, of each agent, up to when it is done; barriers pass that on.
#pragma once

#include <cstdint>

#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator::ordering {

// Moves on whenever somebody learns something.
using Time = uint32_t;

// A thread of the cluster, or, from kMaxThreads on, what brings data on behalf of a barrier in shared memory, of which
// each block has the same number.
using Agent = int;
inline constexpr int kMaxMbarriersOfBlock = 32;
inline constexpr int kMaxMbarriers = kMaxMbarriersOfBlock * kMaxClusterBlocks;
inline constexpr int kMaxAgents = kMaxThreads + kMaxMbarriers;

constexpr Agent copies_of(int mbarrier_idx) { return kMaxThreads + mbarrier_idx; }

// What is known: the accesses of each agent before a time. To TMA and the tensor cores a thread's writes are there only
// if it fenced after them.
struct Knowledge {
  Time done[kMaxAgents];
  Time fenced[kMaxAgents];

  void clear();
  void add(const Knowledge& other);
};

void begin_cluster();
Time now();

// By the running thread: what it did so far can be learned from `to`; it learns what `from` has.
void release(Knowledge& to);
void acquire(const Knowledge& from);
// By another one.
void acquire(int thread, const Knowledge& from);
// What came with a barrier in shared memory so far can be learned from `to`.
void release_copies(int mbarrier_idx, Knowledge& to);
// The running thread's writes so far are there for TMA and the tensor cores, where barriers say so.
void fence();

// All threads of a block learn of each other; those of a warp do.
void on_block_barrier(int block);
void on_warp_barrier(int warp_idx, unsigned lanes);
// A warp's lanes learn what the first of them did: its matrix products, which are those of all of them.
void on_products_wait(int first_lane);

// Whether the running thread knows that an access by `agent` at `time` is over.
bool is_over(Agent agent, Time time);
// Whether any thread of the block knows.
bool is_over_for_any_of(int block, Agent agent, Time time);
bool is_fenced(Agent agent, Time time);

}  // namespace flash_attn::emulator::ordering
