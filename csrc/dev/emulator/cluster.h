// What the thread blocks of a cluster have of each other: their barrier, and shared memory for as long as its block has
// not left.
#pragma once

#include "dev/emulator/ordering.h"

namespace flash_attn::emulator {

void begin_cluster();

// barrier.cluster.arrive and .wait, by the running thread, which does one after the other.
void arrive_at_cluster_barrier();
void wait_at_cluster_barrier();
// A thread returns: the barrier no longer waits for it.
void end_thread_of_cluster(int num_alive);

// `agent` does something to the shared memory of a block that need not be its own. The block fails if it has left, or
// if none of its threads has learned, when the last of them returns, that this is over.
void touch_block(int block, ordering::Agent agent);
// A copy to it begins; it ends with complete_bytes.
void begin_copy_to_block(int block);
void end_copy_to_block(int block, ordering::Agent agent);
// All threads of the running thread's block have returned.
void check_leaving_block();

}  // namespace flash_attn::emulator
