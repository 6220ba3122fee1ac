// How the warpgroups of an SM90 kernel wait for each other. docs/sm90-schedules.md draws it.
#pragma once

#include "kernels/sm90/cluster.h"
#include "kernels/sm90/instructions.h"
#include "variant/tiles.h"

namespace flash_attn::sm90 {

inline constexpr int kMaxConsumerGroups = 3;

// The named barriers of a thread block, of which the hardware has 16 and __syncthreads takes number 0. An entry is the
// first of several: one per consumer group, or one per stage of P.
enum class NamedBarrier : int {
  // Where groups own different rows. + group: it is the group's turn to start matrix products.
  // Waits: the group. Arrives: the group before it. 2 x 128 threads.
  kTurn = 1,
  // + group: the group is done with its part of Q; then: its part of O is in shared memory.
  // Waits and arrives: the group. 128 threads.
  kOutput = kTurn + kMaxConsumerGroups,

  // Where groups share rows. + stage of P; 2 x 128 threads each.
  // P and the rows' factors are in shared memory. Waits: group 1. Arrives: group 0.
  kProbsFull = kOutput + kMaxConsumerGroups,
  // They are no longer in use. Waits: group 0. Arrives: group 1.
  kProbsEmpty = kProbsFull + kProbabilityStagesSm90,
  // Group 0 needs the tensor cores less now. Waits: group 1. Arrives: group 0.
  kFollow = kProbsEmpty + kProbabilityStagesSm90,
  // The rows' last factors are in shared memory. Waits: group 1. Arrives: group 0. One, without stages.
  kLastFactors = kFollow + kProbabilityStagesSm90,
};
static_assert(static_cast<int>(NamedBarrier::kLastFactors) < 16);

__device__ inline void wait_at(NamedBarrier barrier, int offset, int num_threads) {
  wait_at_barrier(static_cast<int>(barrier) + offset, num_threads);
}

__device__ inline void arrive_at(NamedBarrier barrier, int offset, int num_threads) {
  arrive_at_barrier(static_cast<int>(barrier) + offset, num_threads);
}

// The stages of one operand in shared memory. `full` has one arrival, the producer's, and counts the bytes that TMA
// brings. `empty` has one of each consumer warp; in a cluster, whose producers write into each other's stages, of each
// one of all blocks.
template <int kNumStages, class Cluster = SingleBlock>
struct Stages {
  Mbarrier full[kNumStages];
  Mbarrier empty[kNumStages];

  __device__ void init(int num_consumer_warps) {
    for (int stage = 0; stage < kNumStages; ++stage) {
      full[stage].init(1);
      empty[stage].init(num_consumer_warps * Cluster::kNumBlocks);
    }
  }
};

// Where one side stands in the ring of stages: which one comes next, and the parity of its use.
template <int kNumStages>
struct StageCursor {
  int idx = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++idx == kNumStages) {
      idx = 0;
      parity ^= 1;
    }
  }
};

// ---- the producer's side, one thread

// Waits until the consumers are done with the stage, which for its first use they are.
template <int kNumStages, class Cluster>
__device__ void wait_empty(Stages<kNumStages, Cluster>& stages, const StageCursor<kNumStages>& cursor) {
  stages.empty[cursor.idx].wait(cursor.parity ^ 1);
}

// The same, and announces `num_bytes`, those of other producers included.
template <int kNumStages, class Cluster>
__device__ Mbarrier& acquire(Stages<kNumStages, Cluster>& stages, const StageCursor<kNumStages>& cursor,
                             int num_bytes) {
  wait_empty(stages, cursor);
  stages.full[cursor.idx].arrive_and_expect(num_bytes);
  return stages.full[cursor.idx];
}

// ---- the consumers' side

template <int kNumStages, class Cluster>
__device__ void wait_full(Stages<kNumStages, Cluster>& stages, const StageCursor<kNumStages>& cursor) {
  stages.full[cursor.idx].wait(cursor.parity);
}

template <int kNumStages, class Cluster>
__device__ void release(Stages<kNumStages, Cluster>& stages, StageCursor<kNumStages>& cursor) {
  Cluster::arrive(stages.empty[cursor.idx]);
  cursor.advance();
}

}  // namespace flash_attn::sm90
