#include "dev/emulator/ordering.h"

#include <algorithm>

namespace flash_attn::emulator::ordering {
namespace {

Time time_now = 1;
Time block_barrier = 0;  // what came before the last one is known to all
Knowledge known_to[kMaxThreads];
Time fenced_at_block_barrier[kMaxThreads];

void add_times(Time (&to)[kMaxAgents], const Time (&from)[kMaxAgents]) {
  const auto add = [&](int begin, int end) {
    for (int i = begin; i < end; ++i) to[i] = std::max(to[i], from[i]);
  };
  add(0, static_cast<int>(block_dim.x));
  add(kMaxThreads, kMaxAgents);
}

void clear_times(Time (&times)[kMaxAgents]) { std::fill(std::begin(times), std::end(times), Time{0}); }

}  // namespace

void Knowledge::clear() {
  clear_times(done);
  clear_times(fenced);
}

void Knowledge::add(const Knowledge& other) {
  add_times(done, other.done);
  add_times(fenced, other.fenced);
}

void begin_block() {
  time_now = 1;
  block_barrier = 0;
  for (unsigned thread = 0; thread < block_dim.x; ++thread) {
    known_to[thread].clear();
    fenced_at_block_barrier[thread] = 0;
  }
}

Time now() { return time_now; }

void release(Knowledge& to) {
  Knowledge& own = known_to[thread_idx.x];
  own.done[thread_idx.x] = ++time_now;
  to.add(own);
}

void acquire(const Knowledge& from) { acquire(thread_idx.x, from); }

void acquire(int thread, const Knowledge& from) { known_to[thread].add(from); }

void release_copies(int mbarrier_idx, Knowledge& to) { to.done[copies_of(mbarrier_idx)] = ++time_now; }

void fence() { known_to[thread_idx.x].fenced[thread_idx.x] = ++time_now; }

void on_block_barrier() {
  block_barrier = ++time_now;
  for (unsigned thread = 0; thread < block_dim.x; ++thread) {
    fenced_at_block_barrier[thread] = known_to[thread].fenced[thread];
  }
}

void on_warp_barrier(int warp_idx, unsigned lanes) {
  Knowledge all;
  all.clear();
  ++time_now;
  for (int pass = 0; pass < 2; ++pass) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      const int thread = warp_idx * kWarpSize + lane;
      known_to[thread].done[thread] = time_now;
      pass == 0 ? all.add(known_to[thread]) : known_to[thread].add(all);
    }
  }
}

void on_products_wait(int first_lane) {
  ++time_now;
  for (int lane = 0; lane < kWarpSize; ++lane) known_to[first_lane + lane].done[first_lane] = time_now;
}

bool is_over(Agent agent, Time time) {
  const int thread = thread_idx.x;
  return agent == thread || time < block_barrier || time < known_to[thread].done[agent];
}

bool is_fenced(Agent agent, Time time) {
  return time < known_to[thread_idx.x].fenced[agent] || time < fenced_at_block_barrier[agent];
}

}  // namespace flash_attn::emulator::ordering
