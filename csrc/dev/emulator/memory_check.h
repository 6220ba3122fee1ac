// What a kernel may touch, and in what order: the emulator's part of compute-sanitizer's memcheck, initcheck and
// racecheck. Kernels are compiled with -fsanitize=thread, whose calls before each access come here instead of to
// ThreadSanitizer.
#pragma once

#include <cstddef>

namespace flash_attn::emulator::memory {

inline constexpr int kMaxSmemBytes = 227 * 1024;

// That of the running thread's block, or of another one of its cluster.
unsigned char* smem();
unsigned char* smem_of(int block);
// What lies where `own`, of the running thread's block, does.
void* in_block(int block, void* own);
// The block of the cluster whose shared memory this is.
int block_of_smem(const void* smem);

void begin_launch();
void begin_cluster(int smem_bytes);
// The stack of the thread that runs from now on: its own to use.
void set_stack(const void* begin, size_t num_bytes);

// Checks an access by the running thread, which fails if it must not be.
void read(const void* from, size_t num_bytes);
// A read of shared memory of any block of the cluster, for which the hardware has special instructions.
void read_in_cluster(const void* smem, size_t num_bytes);
void write(const void* to, size_t num_bytes);
// The same where other lanes of the warp may store the same value.
void store(const void* to, size_t num_bytes);

// What thread blocks may do at once, to the same memory.
void add_to_global(float* to, float value);
int fetch_and_increment(int* counter);
void store_to_global(int* to, int value);
int load_from_global(const int* from);

// Until the next write to it, this shared memory may not be read.
void expect(const void* smem, size_t num_bytes);

// What TMA and the tensor cores do to shared memory, on behalf of the running thread. From begin to end of a read
// nothing may write it; from begin to end of a write nothing may touch it, and who reads it then has to have waited for
// the barrier in shared memory that the copy comes with. `thread` is the one that began the read. A copy writes to any
// block of the cluster.
void begin_async_read(const void* smem, size_t num_bytes);
void continue_async_read(int thread, const void* smem, size_t num_bytes);
void end_async_read(int thread, const void* smem, size_t num_bytes);
void begin_async_write(void* smem, size_t num_bytes);
void end_async_write(void* smem, size_t num_bytes, int mbarrier_idx);

// Registers of the running thread that the tensor cores read, or write, until they are given back.
struct Registers {
  const void* begin;
  size_t num_bytes;
  bool may_be_read;
};
void lend(const Registers& registers);
void take_back_all();

}  // namespace flash_attn::emulator::memory
