// cp.async: a copy to shared memory lands when its thread waits for it, and not before.
#pragma once

namespace flash_attn::emulator {

inline constexpr int kAsyncCopyBytes = 16;

// Forgets those of all threads of the block that ran before.
void drop_async_copies();

// A copy by the running thread. Zeros are written where `from` is not read.
void start_async_copy(void* smem, const void* from, bool reads);
void commit_async_copies();
// Waits until at most this many of the thread's committed groups are under way.
void wait_for_async_copies(int num_groups_left);
// Waits for those that are not committed, too.
void wait_for_all_async_copies();

}  // namespace flash_attn::emulator
