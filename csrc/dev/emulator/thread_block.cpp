#include "dev/emulator/thread_block.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#include "dev/emulator/async_copies.h"
#include "dev/emulator/barriers.h"
#include "dev/emulator/cluster.h"
#include "dev/emulator/launch_log.h"
#include "dev/emulator/memory_check.h"
#include "dev/emulator/ordering.h"
#include "dev/emulator/register_file.h"
#include "dev/emulator/tma.h"
#include "dev/emulator/warpgroup_products.h"

namespace flash_attn::emulator {

uint3 thread_idx;
uint3 block_idx;
dim3 block_dim;
dim3 grid_dim;
int running_thread;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxPolls = 1000000;

enum class State { kNew, kRunnable, kAtBarrier, kMeeting, kAsleep, kReturned };

struct Fiber {
  State state;
  jmp_buf position;
  unsigned lanes;         // that it meets
  std::string waits_for;  // while it is asleep
};

struct Block {
  int num_alive;
  int num_at_barrier;
};

struct Cluster {
  Fiber fibers[kMaxThreads];
  void* shown[kMaxThreads];
  Block blocks[kMaxClusterBlocks];
  std::vector<int> runnable;
  std::vector<std::function<void()>> later;
  int num_blocks;
  int num_alive;
  int num_polls;

  int num_threads() const { return num_blocks * static_cast<int>(block_dim.x); }
};

Cluster cluster;
unsigned first_block_of_cluster;
jmp_buf launch_position;
std::string error;
const std::function<void()>* thread_body;
// Any order is a right one: a kernel that relies on its own is wrong.
std::minstd_rand order;

char* stack_of(int thread) {
  static char* const stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return stacks + thread * kStackBytes;
}

void make_runnable(int thread) {
  cluster.fibers[thread].state = State::kRunnable;
  cluster.runnable.push_back(thread);
}

void release_barrier(int block) {
  cluster.blocks[block].num_at_barrier = 0;
  ordering::on_block_barrier(block);
  const int num_threads = static_cast<int>(block_dim.x);
  for (int i = block * num_threads; i < (block + 1) * num_threads; ++i) {
    if (cluster.fibers[i].state == State::kAtBarrier) make_runnable(i);
  }
}

[[noreturn]] void run_another();

void run_thread() {
  (*thread_body)();
  end_thread_of_tma();
  end_thread_of_products();
  cluster.fibers[running_thread].state = State::kReturned;
  Block& block = cluster.blocks[block_of_cluster()];
  end_thread_of_cluster(--cluster.num_alive);
  if (--block.num_alive == 0) check_leaving_block();
  if (cluster.num_alive == 0) _longjmp(launch_position, 1);
  if (block.num_at_barrier > 0 && block.num_at_barrier == block.num_alive) release_barrier(block_of_cluster());
  run_another();
}

[[noreturn]] void start(int thread) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack = {.ss_sp = stack_of(thread), .ss_flags = 0, .ss_size = kStackBytes};
  context.uc_link = nullptr;
  makecontext(&context, &run_thread, 0);
  setcontext(&context);
  std::abort();
}

[[noreturn]] void fail_as_stuck() {
  int num_meeting = 0;
  for (int i = 0; i < cluster.num_threads(); ++i) num_meeting += cluster.fibers[i].state == State::kMeeting;
  int num_at_barrier = 0;
  for (int i = 0; i < cluster.num_blocks; ++i) num_at_barrier += cluster.blocks[i].num_at_barrier;
  std::string waiting = std::to_string(num_at_barrier) + " threads wait at __syncthreads and " +
                        std::to_string(num_meeting) + " at an instruction of their warp, for others that never come";
  std::map<std::string, int> num_asleep;
  for (int i = 0; i < cluster.num_threads(); ++i) {
    if (cluster.fibers[i].state == State::kAsleep) ++num_asleep[cluster.fibers[i].waits_for];
  }
  for (const auto& [what, count] : num_asleep) waiting += "; " + std::to_string(count) + " for " + what;
  fail(waiting);
}

// Any moment is a right one, so a step of a thread and what happens by itself are drawn alike.
void let_things_happen() {
  while (!cluster.later.empty()) {
    const size_t drawn = order() % (cluster.later.size() + cluster.runnable.size());
    if (drawn >= cluster.later.size()) return;
    std::swap(cluster.later[drawn], cluster.later.back());
    const std::function<void()> work = std::move(cluster.later.back());
    cluster.later.pop_back();
    work();
  }
}

[[noreturn]] void run_another() {
  let_things_happen();
  if (cluster.runnable.empty()) fail_as_stuck();
  std::swap(cluster.runnable[order() % cluster.runnable.size()], cluster.runnable.back());
  const int next = cluster.runnable.back();
  cluster.runnable.pop_back();
  running_thread = next;
  thread_idx.x = next % block_dim.x;
  block_idx.x = first_block_of_cluster + block_of(next);
  memory::set_stack(stack_of(next), kStackBytes);
  if (cluster.fibers[next].state == State::kNew) start(next);
  _longjmp(cluster.fibers[next].position, 1);
}

void wait(State state) {
  Fiber& fiber = cluster.fibers[running_thread];
  fiber.state = state;
  if (_setjmp(fiber.position) == 0) run_another();
}

void run_cluster() {
  cluster.runnable.clear();
  cluster.later.clear();
  for (int i = 0; i < cluster.num_threads(); ++i) {
    make_runnable(i);
    cluster.fibers[i].state = State::kNew;
  }
  cluster.num_alive = cluster.num_threads();
  for (Block& block : cluster.blocks) block = {.num_alive = static_cast<int>(block_dim.x), .num_at_barrier = 0};
  cluster.num_polls = 0;
  if (_setjmp(launch_position) == 0) run_another();
}

}  // namespace

void run_blocks(const Launch& launch, const std::function<void()>& thread) {
  static std::mutex one_launch;
  const std::lock_guard lock(one_launch);
  const char* given_seed = std::getenv("FLASH_ATTN_EMULATOR_SEED");
  const int seed = given_seed == nullptr ? 1 : std::atoi(given_seed);
  order.seed(seed);
  thread_body = &thread;
  grid_dim = dim3(launch.num_blocks);
  block_dim = dim3(launch.num_threads);
  const int num_threads = launch.cluster_blocks * launch.num_threads;
  if (launch.num_blocks < 1) throw std::runtime_error("emulated kernel: is launched without a thread block");
  if (launch.cluster_blocks > kMaxClusterBlocks || launch.num_blocks % launch.cluster_blocks != 0 ||
      num_threads > kMaxThreads) {
    throw std::runtime_error("emulated kernel: has clusters that the emulator, or its grid, can't have");
  }
  // Blocks that form no cluster run side by side as well, since they share counters and turns; but not those of kernels
  // without dynamic shared memory, since what is static in a kernel is one variable here; nor with every fourth seed,
  // so that what a block writes before another has read it is found.
  const bool joins = launch.cluster_blocks == 1 && launch.smem_bytes > 0 && seed % 4 != 0;
  const int blocks_at_once = joins ? std::min(kMaxClusterBlocks, kMaxThreads / num_threads) : launch.cluster_blocks;
  error.clear();
  memory::begin_launch();
  log_launch();
  for (int i = 0; i < launch.num_blocks && error.empty(); i += blocks_at_once) {
    first_block_of_cluster = i;
    cluster.num_blocks = std::min(blocks_at_once, launch.num_blocks - i);
    ordering::begin_cluster();
    memory::begin_cluster(launch.smem_bytes);
    drop_async_copies();
    drop_barriers();
    drop_tma_copies();
    drop_products();
    begin_register_files();
    begin_cluster();
    run_cluster();
  }
  if (!error.empty()) throw std::runtime_error("emulated kernel: " + error);
}

int num_cluster_blocks() { return cluster.num_blocks; }

bool has_left(int block) { return cluster.blocks[block].num_alive == 0; }

void* dynamic_smem() { return memory::smem(); }

// Not an exception: the compiler takes the memory check's functions, which call it, for ones that throw none.
void fail(const std::string& what) {
  error = "block " + std::to_string(block_idx.x) + ", thread " + std::to_string(thread_idx.x) + ": " + what;
  _longjmp(launch_position, 1);
}

void happen_later(std::function<void()> work) { cluster.later.push_back(std::move(work)); }

void wake(int thread) { make_runnable(thread); }

void sleep(const std::string& waits_for) {
  cluster.fibers[running_thread].waits_for = waits_for;
  wait(State::kAsleep);
}

void sync_block() {
  Block& block = cluster.blocks[block_of_cluster()];
  if (++block.num_at_barrier == block.num_alive) {
    release_barrier(block_of_cluster());
  } else {
    wait(State::kAtBarrier);
  }
}

void meet(unsigned lanes, void* own, void (*step)(unsigned lanes, Shown shown)) {
  const int me = running_thread;
  const int first = me - lane();
  if ((lanes >> lane() & 1) == 0) fail("a lane that isn't named in an instruction's mask executes it");
  cluster.shown[me] = own;
  cluster.fibers[me].lanes = lanes;
  for (int i = 0; i < kWarpSize; ++i) {
    if ((lanes >> i & 1) == 0 || first + i == me) continue;
    const Fiber& other = cluster.fibers[first + i];
    if (other.state != State::kMeeting || other.lanes != lanes) return wait(State::kMeeting);
  }
  step(lanes, cluster.shown + first);
  for (int i = 0; i < kWarpSize; ++i) {
    if ((lanes >> i & 1) != 0 && first + i != me) make_runnable(first + i);
  }
}

void sync_warp(unsigned lanes) {
  meet(lanes, nullptr, [](unsigned lanes, Shown) { ordering::on_warp_barrier(running_thread / kWarpSize, lanes); });
}

void poll() {
  if (++cluster.num_polls > kMaxPolls) fail("waits for a thread block that does not start before it");
  make_runnable(running_thread);
  if (_setjmp(cluster.fibers[running_thread].position) == 0) run_another();
}

}  // namespace flash_attn::emulator
