#include "dev/emulator/thread_block.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#include "dev/emulator/async_copies.h"
#include "dev/emulator/barriers.h"
#include "dev/emulator/copy_engine.h"
#include "dev/emulator/launch_log.h"
#include "dev/emulator/memory_check.h"
#include "dev/emulator/ordering.h"
#include "dev/emulator/register_file.h"
#include "dev/emulator/warpgroup_products.h"

namespace flash_attn::emulator {

uint3 thread_idx;
uint3 block_idx;
dim3 block_dim;
dim3 grid_dim;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxPolls = 10000;

enum class State { kNew, kRunnable, kAtBarrier, kMeeting, kAsleep, kReturned };

struct Fiber {
  State state;
  jmp_buf position;
  unsigned lanes;         // that it meets
  std::string waits_for;  // while it is asleep
};

struct Block {
  Fiber fibers[kMaxThreads];
  void* shown[kMaxThreads];
  std::vector<int> runnable;
  std::vector<std::function<void()>> later;
  int num_alive;
  int num_at_barrier;
  int num_polls;
};

Block block;
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
  block.fibers[thread].state = State::kRunnable;
  block.runnable.push_back(thread);
}

void release_barrier() {
  block.num_at_barrier = 0;
  ordering::on_block_barrier();
  for (int i = 0; i < static_cast<int>(block_dim.x); ++i) {
    if (block.fibers[i].state == State::kAtBarrier) make_runnable(i);
  }
}

[[noreturn]] void run_another();

void run_thread() {
  (*thread_body)();
  end_thread_of_copy_engine();
  end_thread_of_products();
  block.fibers[thread_idx.x].state = State::kReturned;
  if (--block.num_alive == 0) _longjmp(launch_position, 1);
  if (block.num_at_barrier == block.num_alive) release_barrier();
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
  for (unsigned i = 0; i < block_dim.x; ++i) num_meeting += block.fibers[i].state == State::kMeeting;
  std::string waiting = std::to_string(block.num_at_barrier) + " threads wait at __syncthreads and " +
                        std::to_string(num_meeting) + " at an instruction of their warp, for others that never come";
  std::map<std::string, int> num_asleep;
  for (unsigned i = 0; i < block_dim.x; ++i) {
    if (block.fibers[i].state == State::kAsleep) ++num_asleep[block.fibers[i].waits_for];
  }
  for (const auto& [what, count] : num_asleep) waiting += "; " + std::to_string(count) + " for " + what;
  fail(waiting);
}

// Any moment is a right one, so a step of a thread and what happens by itself are drawn alike.
void let_things_happen() {
  while (!block.later.empty()) {
    const size_t drawn = order() % (block.later.size() + block.runnable.size());
    if (drawn >= block.later.size()) return;
    std::swap(block.later[drawn], block.later.back());
    const std::function<void()> work = std::move(block.later.back());
    block.later.pop_back();
    work();
  }
}

[[noreturn]] void run_another() {
  let_things_happen();
  if (block.runnable.empty()) fail_as_stuck();
  std::swap(block.runnable[order() % block.runnable.size()], block.runnable.back());
  const int next = block.runnable.back();
  block.runnable.pop_back();
  thread_idx.x = next;
  memory::set_stack(stack_of(next), kStackBytes);
  if (block.fibers[next].state == State::kNew) start(next);
  _longjmp(block.fibers[next].position, 1);
}

void wait(State state) {
  Fiber& fiber = block.fibers[thread_idx.x];
  fiber.state = state;
  if (_setjmp(fiber.position) == 0) run_another();
}

void run_block(int num_threads) {
  block.runnable.clear();
  block.later.clear();
  for (int i = 0; i < num_threads; ++i) {
    make_runnable(i);
    block.fibers[i].state = State::kNew;
  }
  block.num_alive = num_threads;
  block.num_at_barrier = 0;
  block.num_polls = 0;
  if (_setjmp(launch_position) == 0) run_another();
}

}  // namespace

void run_blocks(int num_blocks, int num_threads, int smem_bytes, const std::function<void()>& thread) {
  static std::mutex one_launch;
  const std::lock_guard lock(one_launch);
  const char* seed = std::getenv("FLASH_ATTN_EMULATOR_SEED");
  order.seed(seed == nullptr ? 1 : std::atoi(seed));
  thread_body = &thread;
  grid_dim = dim3(num_blocks);
  block_dim = dim3(num_threads);
  error.clear();
  memory::begin_launch();
  log_launch();
  for (int i = 0; i < num_blocks && error.empty(); ++i) {
    block_idx = {static_cast<unsigned>(i), 0, 0};
    ordering::begin_block();
    memory::begin_block(smem_bytes);
    drop_async_copies();
    drop_barriers();
    drop_copies_of_engine();
    drop_products();
    begin_register_file();
    run_block(num_threads);
  }
  if (!error.empty()) throw std::runtime_error("emulated kernel: " + error);
}

void* dynamic_smem() { return memory::smem(); }

// Not an exception: the compiler takes the memory check's functions, which call it, for ones that throw none.
void fail(const std::string& what) {
  error = "block " + std::to_string(block_idx.x) + ", thread " + std::to_string(thread_idx.x) + ": " + what;
  _longjmp(launch_position, 1);
}

void happen_later(std::function<void()> work) { block.later.push_back(std::move(work)); }

void wake(int thread) { make_runnable(thread); }

void sleep(const std::string& waits_for) {
  block.fibers[thread_idx.x].waits_for = waits_for;
  wait(State::kAsleep);
}

void sync_block() {
  if (++block.num_at_barrier == block.num_alive) {
    release_barrier();
  } else {
    wait(State::kAtBarrier);
  }
}

void meet(unsigned lanes, void* own, void (*step)(unsigned lanes, Shown shown)) {
  const int me = thread_idx.x;
  const int first = me - lane();
  if ((lanes >> lane() & 1) == 0) fail("a lane that isn't named in an instruction's mask executes it");
  block.shown[me] = own;
  block.fibers[me].lanes = lanes;
  for (int i = 0; i < kWarpSize; ++i) {
    if ((lanes >> i & 1) == 0 || first + i == me) continue;
    const Fiber& other = block.fibers[first + i];
    if (other.state != State::kMeeting || other.lanes != lanes) return wait(State::kMeeting);
  }
  step(lanes, block.shown + first);
  for (int i = 0; i < kWarpSize; ++i) {
    if ((lanes >> i & 1) != 0 && first + i != me) make_runnable(first + i);
  }
}

void sync_warp(unsigned lanes) {
  meet(lanes, nullptr, [](unsigned lanes, Shown) { ordering::on_warp_barrier(thread_idx.x / kWarpSize, lanes); });
}

void poll() {
  if (++block.num_polls > kMaxPolls) fail("waits for a thread block that does not start before it");
}

}  // namespace flash_attn::emulator
