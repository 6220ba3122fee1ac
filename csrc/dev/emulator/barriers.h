// The barriers that some of a block's threads wait at: the hardware's 16, and those in shared memory.
#pragma once

namespace flash_attn::emulator {

// Forgets those of the cluster that ran before.
void drop_barriers();

// bar.sync and bar.arrive; a barrier has the same number of threads each time it is used until it opens.
void wait_at_named_barrier(int id, int num_threads);
void arrive_at_named_barrier(int id, int num_threads);

// mbarriers, known by the address of their eight bytes. A phase ends when no arrival and no byte is missing.
void init_mbarrier(void* at, int num_arrivals);
void fence_mbarrier_init();
void arrive_at_mbarrier(void* at);
// Arrives at the barrier that lies there in the shared memory of a block of the cluster.
void arrive_at_mbarrier_of_block(void* at, int block);
void arrive_and_expect_bytes(void* at, int num_bytes);
void wait_at_mbarrier(void* at, unsigned parity);
// The number of the barrier in any block of the cluster, for copies that will end with complete_bytes.
int mbarrier_for_copy(void* at);
void complete_bytes(int mbarrier_idx, int num_bytes);

}  // namespace flash_attn::emulator
