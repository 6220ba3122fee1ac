// wgmma: matrix products that run some time between their start and their thread's wait.
#pragma once

#include <cstdint>

namespace flash_attn::emulator {

enum class ProductElement { kFp16, kBf16 };

// The dimension along which B's elements are neighbours: the columns of A, or the columns of the result.
enum class Major { kK, kMN };

// acc += A B of m64nNk16; a lane's view of it.
struct Product {
  ProductElement element;
  int n;
  uint64_t a;                   // A's descriptor, unless it is in registers
  const uint32_t* a_registers;  // 4 of them, or null
  uint64_t b;                   // B's descriptor
  Major b_major;
  bool starts_at_zero;
  float* acc;  // n / 2 of them
};

// Forgets those of all threads of the block that ran before.
void drop_products();

// The running thread does these with all lanes of its warp.
void start_product(const Product& product);
void commit_products();
void wait_for_products(int num_groups_left);
// A thread returns: nothing of it may be under way.
void end_thread_of_products();

}  // namespace flash_attn::emulator
