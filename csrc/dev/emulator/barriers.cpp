#include "dev/emulator/barriers.h"

#include <string>
#include <vector>

#include "dev/emulator/cluster.h"
#include "dev/emulator/meeting.h"
#include "dev/emulator/memory_check.h"
#include "dev/emulator/ordering.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {
namespace {

constexpr int kNumNamedBarriers = 16;
constexpr int kMbarrierBytes = 8;

struct NamedBarrier {
  int num_threads = 0;  // 0: nobody is there
  int num_arrived = 0;
  Meeting meeting;
};

struct Mbarrier {
  void* at = nullptr;
  int num_arrivals;  // of each phase
  int num_missing;
  int num_missing_bytes = 0;
  unsigned parity = 0;  // of the phase that is under way
  bool is_fenced = false;
  int initialised_by;
  Meeting meeting;
};

NamedBarrier named_barriers[kMaxClusterBlocks][kNumNamedBarriers];
std::vector<Mbarrier> mbarriers[kMaxClusterBlocks];

std::string name_of(const void* at) {
  const int block = memory::block_of_smem(at);
  const std::string of_block =
      block == block_of_cluster() ? "" : " of block " + std::to_string(block) + " of the cluster";
  return "the mbarrier at byte " + std::to_string(static_cast<const unsigned char*>(at) - memory::smem_of(block)) +
         of_block;
}

NamedBarrier& come_to(int id, int num_threads) {
  const std::string name = "barrier " + std::to_string(id);
  if (id < 0 || id >= kNumNamedBarriers) fail(name + " is none of the hardware's");
  if (num_threads <= 0 || num_threads % kWarpSize != 0) fail(name + " counts warps");
  NamedBarrier& barrier = named_barriers[block_of_cluster()][id];
  if (barrier.num_threads != 0 && barrier.num_threads != num_threads) {
    fail(name + " is used for " + std::to_string(num_threads) + " threads while it is for " +
         std::to_string(barrier.num_threads));
  }
  barrier.num_threads = num_threads;
  ++barrier.num_arrived;
  ordering::release(barrier.meeting.arrived);
  return barrier;
}

bool all_came(const NamedBarrier& barrier) { return barrier.num_arrived == barrier.num_threads; }

void open(NamedBarrier& barrier) {
  barrier.num_threads = barrier.num_arrived = 0;
  barrier.meeting.end_phase();
}

Mbarrier& mbarrier_of(int idx) {
  return mbarriers[idx / ordering::kMaxMbarriersOfBlock][idx % ordering::kMaxMbarriersOfBlock];
}

// Its number.
int find_mbarrier(void* at) {
  const int block = memory::block_of_smem(at);
  block == block_of_cluster() ? memory::read(at, kMbarrierBytes) : memory::read_in_cluster(at, kMbarrierBytes);
  const std::vector<Mbarrier>& of_block = mbarriers[block];
  for (size_t idx = 0; idx < of_block.size(); ++idx) {
    if (of_block[idx].at == at) return block * ordering::kMaxMbarriersOfBlock + static_cast<int>(idx);
  }
  fail("there is no barrier at " + name_of(at));
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.num_missing > 0 || barrier.num_missing_bytes != 0) return;
  barrier.num_missing = barrier.num_arrivals;
  barrier.parity ^= 1;
  barrier.meeting.end_phase();
}

}  // namespace

void drop_barriers() {
  for (auto& of_block : named_barriers) {
    for (NamedBarrier& barrier : of_block) {
      barrier.num_threads = barrier.num_arrived = 0;
      barrier.meeting.clear();
    }
  }
  for (std::vector<Mbarrier>& of_block : mbarriers) {
    of_block.clear();
    of_block.reserve(ordering::kMaxMbarriersOfBlock);
  }
}

void wait_at_named_barrier(int id, int num_threads) {
  NamedBarrier& barrier = come_to(id, num_threads);
  if (all_came(barrier)) {
    open(barrier);
    ordering::acquire(barrier.meeting.passed);
    return;
  }
  barrier.meeting.waiting.push_back(running_thread);
  sleep("barrier " + std::to_string(id));
}

void arrive_at_named_barrier(int id, int num_threads) {
  NamedBarrier& barrier = come_to(id, num_threads);
  if (all_came(barrier)) open(barrier);
}

void init_mbarrier(void* at, int num_arrivals) {
  memory::write(at, kMbarrierBytes);
  if (reinterpret_cast<uintptr_t>(at) % kMbarrierBytes != 0) fail(name_of(at) + " is not aligned to eight bytes");
  std::vector<Mbarrier>& of_block = mbarriers[block_of_cluster()];
  if (of_block.size() == ordering::kMaxMbarriersOfBlock) fail("has more mbarriers than the emulator");
  Mbarrier& barrier = of_block.emplace_back();
  barrier.at = at;
  barrier.num_arrivals = barrier.num_missing = num_arrivals;
  barrier.initialised_by = running_thread;
  barrier.meeting.clear();
}

void fence_mbarrier_init() {
  for (Mbarrier& barrier : mbarriers[block_of_cluster()]) {
    if (barrier.initialised_by == running_thread) barrier.is_fenced = true;
  }
}

void arrive_and_expect_bytes(void* at, int num_bytes) {
  Mbarrier& barrier = mbarrier_of(find_mbarrier(at));
  if (barrier.num_missing == 0) fail("arrives at " + name_of(at) + " more often than it was initialised for");
  barrier.num_missing_bytes += num_bytes;
  --barrier.num_missing;
  ordering::release(barrier.meeting.arrived);
  end_phase_if_complete(barrier);
}

void arrive_at_mbarrier(void* at) { arrive_and_expect_bytes(at, 0); }

void arrive_at_mbarrier_of_block(void* at, int block) {
  touch_block(block, running_thread);
  arrive_at_mbarrier(memory::in_block(block, at));
}

void wait_at_mbarrier(void* at, unsigned parity) {
  Mbarrier& barrier = mbarrier_of(find_mbarrier(at));
  if (barrier.parity != parity % 2) {
    ordering::acquire(barrier.meeting.passed);
    return;
  }
  barrier.meeting.waiting.push_back(running_thread);
  sleep(name_of(at) + " and parity " + std::to_string(parity % 2));
}

int mbarrier_for_copy(void* at) {
  const int idx = find_mbarrier(at);
  if (!mbarrier_of(idx).is_fenced) fail("copies with " + name_of(at) + ", whose initialisation was not fenced");
  return idx;
}

void complete_bytes(int mbarrier_idx, int num_bytes) {
  Mbarrier& barrier = mbarrier_of(mbarrier_idx);
  barrier.num_missing_bytes -= num_bytes;
  end_copy_to_block(memory::block_of_smem(barrier.at), ordering::copies_of(mbarrier_idx));
  ordering::release_copies(mbarrier_idx, barrier.meeting.arrived);
  end_phase_if_complete(barrier);
}

}  // namespace flash_attn::emulator
