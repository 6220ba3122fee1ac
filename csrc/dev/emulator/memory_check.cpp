#include "dev/emulator/memory_check.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "dev/emulator/tensor_memory.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator::memory {
namespace {

constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type
constexpr int kCellBytes = 2;
constexpr int kMaxWarps = 32;

// When a thread came by: between which barriers of its block and of its warp.
struct Visit {
  int thread = -1;
  unsigned block_epoch = 0;
  unsigned warp_epoch = 0;
};

enum class Content { kNone, kExpected, kThere };

struct Cell {
  Content content = Content::kNone;
  Visit write;
  Visit read;            // the last
  unsigned readers = 0;  // warps that read since the barrier before it
};

alignas(1024) unsigned char smem_bytes[kMaxSmemBytes];
int smem_size = 0;
std::vector<Cell> cells(kMaxSmemBytes / kCellBytes);
unsigned block_epoch = 0;
unsigned warp_epochs[kMaxWarps];
uintptr_t stack_begin = 0;
size_t stack_size = 0;

Visit this_visit() {
  const int thread = thread_idx.x;
  return {thread, block_epoch, warp_epochs[thread / kWarpSize]};
}

bool is_ordered(const Visit& before, const Visit& now) {
  if (before.thread < 0 || before.thread == now.thread || before.block_epoch != now.block_epoch) return true;
  return before.thread / kWarpSize == now.thread / kWarpSize && before.warp_epoch != now.warp_epoch;
}

[[noreturn]] void fail_at(const char* what, size_t cell_idx, const char* other_did, int other) {
  fail(std::string(what) + " byte " + std::to_string(cell_idx * kCellBytes) + " of shared memory, which thread " +
       std::to_string(other) + " " + other_did + ", with no barrier between");
}

void read_cell(size_t idx, const Visit& now) {
  Cell& cell = cells[idx];
  if (cell.content == Content::kNone) {
    fail("reads byte " + std::to_string(idx * kCellBytes) + " of shared memory, which nothing has written");
  }
  if (cell.content == Content::kExpected) {
    fail("reads byte " + std::to_string(idx * kCellBytes) + " of shared memory while a cp.async to it is under way");
  }
  if (!is_ordered(cell.write, now)) fail_at("reads", idx, "wrote", cell.write.thread);
  if (cell.read.block_epoch != now.block_epoch) cell.readers = 0;
  cell.readers |= 1u << (now.thread / kWarpSize);
  cell.read = now;
}

void write_cell(size_t idx, const Visit& now, Content content) {
  Cell& cell = cells[idx];
  // Lanes of a warp may write what they agree on.
  const bool same_warp = cell.write.thread / kWarpSize == now.thread / kWarpSize;
  if (!same_warp && !is_ordered(cell.write, now)) fail_at("writes", idx, "wrote", cell.write.thread);
  const unsigned others = cell.readers & ~(1u << (now.thread / kWarpSize));
  if (!is_ordered(cell.read, now) || (cell.read.block_epoch == now.block_epoch && others != 0)) {
    fail_at("writes", idx, "or a thread of another warp read", cell.read.thread);
  }
  cell.content = content;
  cell.write = now;
}

template <class Visitor>
void check(const void* address, size_t num_bytes, const char* verb, const Visitor& visit) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (begin - stack_begin < stack_size) return;
  const uintptr_t offset = begin - reinterpret_cast<uintptr_t>(smem_bytes);
  if (offset >= kMaxSmemBytes) {
    if (!tensor_memory::may_touch(begin, num_bytes)) fail(std::string(verb) + " global memory outside of any tensor");
    return;
  }
  if (offset + num_bytes > static_cast<size_t>(smem_size)) {
    fail(std::string(verb) + " byte " + std::to_string(offset) + " of " + std::to_string(smem_size) +
         " bytes of shared memory");
  }
  for (size_t idx = offset / kCellBytes; idx * kCellBytes < offset + num_bytes; ++idx) visit(idx);
}

}  // namespace

unsigned char* smem() { return smem_bytes; }

void begin_block(int smem_size_now) {
  smem_size = smem_size_now;
  std::memset(smem_bytes, kPoison, smem_size);
  std::fill(cells.begin(), cells.begin() + (smem_size + kCellBytes - 1) / kCellBytes, Cell{});
  ++block_epoch;
}

void on_block_barrier() { ++block_epoch; }
void on_warp_barrier(int warp_idx) { ++warp_epochs[warp_idx]; }

void set_stack(const void* begin, size_t num_bytes) {
  stack_begin = reinterpret_cast<uintptr_t>(begin);
  stack_size = num_bytes;
}

void read(const void* from, size_t num_bytes) {
  check(from, num_bytes, "reads", [now = this_visit()](size_t idx) { read_cell(idx, now); });
}

void write(const void* to, size_t num_bytes) {
  check(to, num_bytes, "writes", [now = this_visit()](size_t idx) { write_cell(idx, now, Content::kThere); });
}

void expect(const void* smem, size_t num_bytes) {
  check(smem, num_bytes, "writes", [now = this_visit()](size_t idx) { write_cell(idx, now, Content::kExpected); });
  std::memset(const_cast<void*>(smem), kPoison, num_bytes);
}

}  // namespace flash_attn::emulator::memory

// What the compiler calls before an access.
namespace memory = flash_attn::emulator::memory;
extern "C" {
#define CHECK_OF_SIZE(size)                                              \
  void __tsan_read##size(void* at) { memory::read(at, size); }           \
  void __tsan_write##size(void* at) { memory::write(at, size); }         \
  void __tsan_unaligned_read##size(void* at) { memory::read(at, size); } \
  void __tsan_unaligned_write##size(void* at) { memory::write(at, size); }
CHECK_OF_SIZE(1)
CHECK_OF_SIZE(2)
CHECK_OF_SIZE(4)
CHECK_OF_SIZE(8)
CHECK_OF_SIZE(16)
void __tsan_read_range(void* at, unsigned long size) { memory::read(at, size); }
void __tsan_write_range(void* at, unsigned long size) { memory::write(at, size); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
uint64_t __tsan_atomic64_load(const volatile uint64_t* from, int) { return *from; }
uint64_t __tsan_atomic64_fetch_or(volatile uint64_t* to, uint64_t bits, int) { return __atomic_fetch_or(to, bits, 0); }
}
