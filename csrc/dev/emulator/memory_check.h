// What a kernel may touch, and in what order: the emulator's part of compute-sanitizer's memcheck, initcheck and
// racecheck. Kernels are compiled with -fsanitize=thread, whose calls before each access come here instead of to
// ThreadSanitizer.
#pragma once

#include <cstddef>

namespace flash_attn::emulator::memory {

inline constexpr int kMaxSmemBytes = 227 * 1024;

unsigned char* smem();

void begin_block(int smem_bytes);
void on_block_barrier();
void on_warp_barrier(int warp_idx);
// Of the thread that runs from now on: its own to use.
void set_stack(const void* begin, size_t num_bytes);

// Checks an access by the running thread, which fails if it must not be.
void read(const void* from, size_t num_bytes);
void write(const void* to, size_t num_bytes);

// Until the next write to it, this shared memory may not be read.
void expect(const void* smem, size_t num_bytes);

}  // namespace flash_attn::emulator::memory
