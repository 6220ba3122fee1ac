#include "dev/emulator/memory_check.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dev/emulator/ordering.h"
#include "dev/emulator/tensor_memory.h"
#include "dev/emulator/thread_block.h"
#include "variant/rounding.h"

namespace flash_attn::emulator::memory {
namespace {

constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type
constexpr int kCellBytes = 2;
constexpr int kNumCells = kMaxSmemBytes / kCellBytes;  // of a block; those of a cluster's lie one after the other
constexpr size_t kClusterSmemBytes = kMaxSmemBytes * kMaxClusterBlocks;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

enum class Content { kNone, kExpected, kThere };

// kGeneric: a thread's loads and stores. kAsync: those of TMA and the tensor cores.
enum class Proxy { kGeneric, kAsync };

struct Cell {
  Content content = Content::kNone;
  Proxy proxy = Proxy::kGeneric;  // of the last write
  ordering::Agent writer = -1;
  ordering::Time write_time = 0;
  unsigned readers = 0;  // warps that read since
};

// A warp's last read of a cell.
struct Read {
  uint32_t time : 27;
  uint32_t lane : 5;
};
constexpr uint32_t kUnderWay = (1u << 27) - 1;

// A store to what another lane of the warp stored to, with no barrier between: right if both store the same.
struct Agreement {
  size_t cell_idx;
  uint16_t before;
  int other;
  int thread;
};

// Who wrote the cells of a piece of global memory, in the running launch.
struct GlobalWrite {
  int block = -1;
  int thread = -1;
  ordering::Time time = 0;
};
constexpr size_t kCellsPerPiece = 64;
using GlobalPiece = std::array<GlobalWrite, kCellsPerPiece>;

alignas(1024) unsigned char smem_bytes[kClusterSmemBytes];
static_assert(kMaxSmemBytes % 1024 == 0, "each block's begins where a swizzle's pattern does");
int smem_size = 0;
std::vector<Cell> cells(kNumCells* kMaxClusterBlocks);
std::vector<Read> reads_of_warp[kMaxWarps];
std::vector<Registers> lent[kMaxThreads];
std::vector<Agreement> agreements;  // of the store that is under way
std::unordered_map<uintptr_t, GlobalPiece> global_writes;
uintptr_t stack_begin = 0;
size_t stack_size = 0;

std::string byte_of(size_t cell_idx) {
  const int block = static_cast<int>(cell_idx / kNumCells);
  const bool is_own = block == block_of_cluster();
  return " byte " + std::to_string(cell_idx % kNumCells * kCellBytes) + " of " +
         (is_own ? "" : "block " + std::to_string(block) + " of the cluster's ") + "shared memory";
}

[[noreturn]] void fail_at(const char* what, size_t cell_idx, const char* other_did, int other) {
  fail(what + byte_of(cell_idx) + ", which " +
       (other < kMaxThreads ? "thread " + std::to_string(other) : std::string("a copy of TMA")) + " " + other_did +
       ", with no barrier between");
}

void mark_read(size_t idx, int thread, uint32_t time) {
  const int warp = thread / kWarpSize;
  cells[idx].readers |= 1u << warp;
  reads_of_warp[warp][idx] = {.time = time, .lane = static_cast<uint32_t>(thread % kWarpSize)};
}

void read_cell(size_t idx, Proxy proxy) {
  const Cell& cell = cells[idx];
  if (cell.content == Content::kNone) fail("reads" + byte_of(idx) + ", which nothing has written");
  if (cell.content == Content::kExpected) fail("reads" + byte_of(idx) + " while a copy to it is under way");
  if (!ordering::is_over(cell.writer, cell.write_time)) fail_at("reads", idx, "wrote", cell.writer);
  const bool needs_fence = proxy == Proxy::kAsync && cell.proxy == Proxy::kGeneric;
  if (needs_fence && !ordering::is_fenced(cell.writer, cell.write_time)) {
    fail("has TMA or the tensor cores read" + byte_of(idx) + ", which thread " + std::to_string(cell.writer) +
         " wrote, with no fence after it");
  }
}

void check_readers(size_t idx) {
  for (unsigned left = cells[idx].readers; left != 0; left &= left - 1) {
    const int warp = __builtin_ctz(left);
    const Read& read = reads_of_warp[warp][idx];
    const int reader = warp * kWarpSize + static_cast<int>(read.lane);
    if (read.time == kUnderWay) {
      fail("writes" + byte_of(idx) + ", which TMA or the tensor cores still read for thread " + std::to_string(reader));
    }
    if (!ordering::is_over(reader, read.time)) fail_at("writes", idx, "or another one of its warp read", reader);
  }
}

uint16_t value_of(size_t cell_idx) {
  static_assert(sizeof(uint16_t) == kCellBytes);
  uint16_t value;
  std::memcpy(&value, smem_bytes + cell_idx * kCellBytes, kCellBytes);
  return value;
}

// The compiler's calls come before the store; what was stored is there at the next one.
void settle_agreements() {
  if (agreements.empty()) return;
  const std::vector<Agreement> settled = std::exchange(agreements, {});
  for (const Agreement& agreement : settled) {
    if (value_of(agreement.cell_idx) == agreement.before) continue;
    fail("thread " + std::to_string(agreement.thread) + " writes" + byte_of(agreement.cell_idx) + ", to which thread " +
         std::to_string(agreement.other) + " wrote another value, with no barrier between");
  }
}

enum class Overlap { kNever, kOfEqualValues };

void write_cell(size_t idx, Content content, Proxy proxy, Overlap overlap) {
  Cell& cell = cells[idx];
  const int thread = running_thread;
  if (cell.writer >= 0 && !ordering::is_over(cell.writer, cell.write_time)) {
    const bool may_agree = overlap == Overlap::kOfEqualValues && cell.content == Content::kThere &&
                           cell.writer / kWarpSize == thread / kWarpSize;
    if (!may_agree) fail_at("writes", idx, "wrote", cell.writer);
    agreements.push_back({idx, value_of(idx), cell.writer, thread});
  }
  if (cell.content == Content::kExpected && cell.proxy == Proxy::kAsync) {
    fail("writes" + byte_of(idx) + " while a copy to it is under way");
  }
  check_readers(idx);
  cell = {.content = content, .proxy = proxy, .writer = thread, .write_time = ordering::now()};
}

void check_registers(uintptr_t begin, size_t num_bytes, const char* verb) {
  for (const Registers& registers : lent[running_thread]) {
    const auto first = reinterpret_cast<uintptr_t>(registers.begin);
    if (begin >= first + registers.num_bytes || begin + num_bytes <= first) continue;
    if (registers.may_be_read && verb[0] == 'r') continue;
    fail(std::string(verb) + " registers of a matrix product that it has not waited for");
  }
}

enum class Access { kRead, kWrite };

constexpr const char* verb_of(Access access) { return access == Access::kRead ? "reads" : "writes"; }

// Thread blocks run in any order, or at once: what one writes is for the next launch, and for one thread to write.
void check_order_of_global(const GlobalWrite& write, uintptr_t cell_idx, Access access) {
  const bool same_block = write.block == static_cast<int>(block_idx.x);
  if (write.block < 0 || (same_block && ordering::is_over(write.thread, write.time))) return;
  fail(std::string(verb_of(access)) + " global memory at " + std::to_string(cell_idx * kCellBytes) + ", which thread " +
       std::to_string(write.thread) + " of block " + std::to_string(write.block) +
       " wrote in this launch, with nothing to order them");
}

void visit_global(uintptr_t begin, size_t num_bytes, Access access) {
  if (access == Access::kRead && global_writes.empty()) return;
  for (uintptr_t idx = begin / kCellBytes; idx * kCellBytes < begin + num_bytes; ++idx) {
    if (access == Access::kRead && !global_writes.contains(idx / kCellsPerPiece)) continue;
    GlobalWrite& write = global_writes[idx / kCellsPerPiece][idx % kCellsPerPiece];
    check_order_of_global(write, idx, access);
    if (access == Access::kWrite) {
      write = {static_cast<int>(block_idx.x), running_thread, ordering::now()};
    }
  }
}

// Each cell of shared memory that was checked before.
template <class Visitor>
void for_each_cell(const void* smem, size_t num_bytes, const Visitor& visit) {
  const size_t offset = static_cast<const unsigned char*>(smem) - smem_bytes;
  for (size_t idx = offset / kCellBytes; idx * kCellBytes < offset + num_bytes; ++idx) visit(idx);
}

enum class Smem { kOfBlock, kOfCluster };

template <class Visitor>
void check(const void* address, size_t num_bytes, Access access, const Visitor& visit, Smem may_be = Smem::kOfBlock) {
  const char* const verb = verb_of(access);
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (begin - stack_begin < stack_size) return check_registers(begin, num_bytes, verb);
  settle_agreements();
  if (begin - reinterpret_cast<uintptr_t>(smem_bytes) >= kClusterSmemBytes) {
    if (!tensor_memory::holds(begin)) return;
    if (!tensor_memory::may_touch(begin, num_bytes)) fail(std::string(verb) + " global memory outside of any tensor");
    return visit_global(begin, num_bytes, access);
  }
  const int block = block_of_smem(address);
  const uintptr_t offset = begin - reinterpret_cast<uintptr_t>(smem_of(block));
  if (may_be == Smem::kOfBlock && block != block_of_cluster()) {
    fail(std::string(verb) + " the shared memory of another thread block as its own");
  }
  if (offset + num_bytes > static_cast<size_t>(smem_size)) {
    fail(std::string(verb) + " byte " + std::to_string(offset) + " of " + std::to_string(smem_size) +
         " bytes of shared memory");
  }
  for_each_cell(address, num_bytes, visit);
}

}  // namespace

unsigned char* smem() { return smem_of(block_of_cluster()); }

unsigned char* smem_of(int block) { return smem_bytes + block * size_t{kMaxSmemBytes}; }

void* in_block(int block, void* own) { return smem_of(block) + (static_cast<unsigned char*>(own) - smem()); }

int block_of_smem(const void* smem) {
  return static_cast<int>((static_cast<const unsigned char*>(smem) - smem_bytes) / kMaxSmemBytes);
}

void begin_launch() { global_writes.clear(); }

void begin_cluster(int smem_size_now) {
  smem_size = smem_size_now;
  const int num_blocks = num_cluster_blocks();
  for (int block = 0; block < num_blocks; ++block) {
    std::memset(smem_of(block), kPoison, smem_size);
    std::fill_n(cells.begin() + block * kNumCells, ceil_div(smem_size, kCellBytes), Cell{});
  }
  for (unsigned warp = 0; warp * kWarpSize < num_blocks * block_dim.x; ++warp) {
    std::vector<Read>& reads = reads_of_warp[warp];
    reads.resize(std::max<size_t>(reads.size(), num_blocks * kNumCells));
  }
  for (auto& registers : lent) registers.clear();
  agreements.clear();
}

void set_stack(const void* begin, size_t num_bytes) {
  settle_agreements();
  stack_begin = reinterpret_cast<uintptr_t>(begin);
  stack_size = num_bytes;
}

void read(const void* from, size_t num_bytes) {
  check(from, num_bytes, Access::kRead, [](size_t idx) {
    read_cell(idx, Proxy::kGeneric);
    mark_read(idx, running_thread, ordering::now());
  });
}

void read_in_cluster(const void* smem, size_t num_bytes) {
  const auto visit = [](size_t idx) { read_cell(idx, Proxy::kGeneric); };
  check(smem, num_bytes, Access::kRead, visit, Smem::kOfCluster);
}

void write(const void* to, size_t num_bytes) {
  check(to, num_bytes, Access::kWrite,
        [](size_t idx) { write_cell(idx, Content::kThere, Proxy::kGeneric, Overlap::kNever); });
}

void store(const void* to, size_t num_bytes) {
  check(to, num_bytes, Access::kWrite,
        [](size_t idx) { write_cell(idx, Content::kThere, Proxy::kGeneric, Overlap::kOfEqualValues); });
}

void expect(const void* smem, size_t num_bytes) {
  check(smem, num_bytes, Access::kWrite,
        [](size_t idx) { write_cell(idx, Content::kExpected, Proxy::kGeneric, Overlap::kNever); });
  std::memset(const_cast<void*>(smem), kPoison, num_bytes);
}

void begin_async_read(const void* smem, size_t num_bytes) {
  check(smem, num_bytes, Access::kRead, [](size_t idx) {
    read_cell(idx, Proxy::kAsync);
    mark_read(idx, running_thread, kUnderWay);
  });
}

void continue_async_read(int thread, const void* smem, size_t num_bytes) {
  for_each_cell(smem, num_bytes, [thread](size_t idx) { mark_read(idx, thread, kUnderWay); });
}

void end_async_read(int thread, const void* smem, size_t num_bytes) {
  for_each_cell(smem, num_bytes, [thread](size_t idx) { mark_read(idx, thread, ordering::now()); });
}

void begin_async_write(void* smem, size_t num_bytes) {
  const auto visit = [](size_t idx) { write_cell(idx, Content::kExpected, Proxy::kAsync, Overlap::kNever); };
  check(smem, num_bytes, Access::kWrite, visit, Smem::kOfCluster);
  std::memset(smem, kPoison, num_bytes);
}

void end_async_write(void* smem, size_t num_bytes, int mbarrier_idx) {
  for_each_cell(smem, num_bytes, [mbarrier_idx](size_t idx) {
    cells[idx] = {.content = Content::kThere,
                  .proxy = Proxy::kAsync,
                  .writer = ordering::copies_of(mbarrier_idx),
                  .write_time = ordering::now()};
  });
}

void lend(const Registers& registers) {
  const auto* const begin = static_cast<const char*>(registers.begin);
  for (Registers& before : lent[running_thread]) {
    const auto* const first = static_cast<const char*>(before.begin);
    if (before.may_be_read != registers.may_be_read) continue;
    if (first <= begin && begin + registers.num_bytes <= first + before.num_bytes) return;
    if (first + before.num_bytes == begin) {
      before.num_bytes += registers.num_bytes;
      return;
    }
  }
  lent[running_thread].push_back(registers);
}

void take_back_all() { lent[running_thread].clear(); }

void add_to_global(float* to, float value) {
  if (!tensor_memory::may_touch(reinterpret_cast<uintptr_t>(to), sizeof *to)) fail("adds outside of any tensor");
  *to += value;
}

int fetch_and_increment(int* counter) {
  if (!tensor_memory::may_touch(reinterpret_cast<uintptr_t>(counter), sizeof *counter))
    fail("counts outside of any tensor");
  return (*counter)++;
}

void store_to_global(int* to, int value) {
  if (!tensor_memory::may_touch(reinterpret_cast<uintptr_t>(to), sizeof *to)) fail("writes outside of any tensor");
  *to = value;
}

int load_from_global(const int* from) {
  if (!tensor_memory::may_touch(reinterpret_cast<uintptr_t>(from), sizeof *from)) fail("reads outside of any tensor");
  return *from;
}

}  // namespace flash_attn::emulator::memory

// What the compiler calls before an access.
namespace memory = flash_attn::emulator::memory;
extern "C" {
#define CHECK_OF_SIZE(size)                                              \
  void __tsan_read##size(void* at) { memory::read(at, size); }           \
  void __tsan_write##size(void* at) { memory::store(at, size); }         \
  void __tsan_unaligned_read##size(void* at) { memory::read(at, size); } \
  void __tsan_unaligned_write##size(void* at) { memory::store(at, size); }
CHECK_OF_SIZE(1)
CHECK_OF_SIZE(2)
CHECK_OF_SIZE(4)
CHECK_OF_SIZE(8)
CHECK_OF_SIZE(16)
void __tsan_read_range(void* at, unsigned long size) { memory::read(at, size); }
void __tsan_write_range(void* at, unsigned long size) { memory::store(at, size); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
uint8_t __tsan_atomic8_load(const volatile uint8_t* from, int) { return *from; }
uint64_t __tsan_atomic64_load(const volatile uint64_t* from, int) { return *from; }
uint64_t __tsan_atomic64_fetch_or(volatile uint64_t* to, uint64_t bits, int) { return __atomic_fetch_or(to, bits, 0); }
}
