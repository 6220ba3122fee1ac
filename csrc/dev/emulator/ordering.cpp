#include "dev/emulator/ordering.h"

#include <algorithm>

namespace flash_attn::emulator::ordering {
namespace {

Time time_now = 1;
Time block_barriers[kMaxClusterBlocks];  // what came before the last one is known to all of the block
Knowledge known_to[kMaxThreads];
Time fenced_at_block_barrier[kMaxThreads];

void add_times(Time (&to)[kMaxAgents], const Time (&from)[kMaxAgents]) {
  const auto add = [&](int begin, int end) {
    for (int i = begin; i < end; ++i) to[i] = std::max(to[i], from[i]);
  };
  add(0, num_cluster_blocks() * static_cast<int>(block_dim.x));
  add(kMaxThreads, kMaxAgents);
}

int block_of_agent(Agent agent) {
  return agent < kMaxThreads ? block_of(agent) : (agent - kMaxThreads) / kMaxMbarriersOfBlock;
}

bool is_over_for(int thread, Agent agent, Time time) {
  const int block = block_of(thread);
  return agent == thread || time < known_to[thread].done[agent] ||
         (time < block_barriers[block] && block == block_of_agent(agent));
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

void begin_cluster() {
  time_now = 1;
  std::fill(std::begin(block_barriers), std::end(block_barriers), Time{0});
  for (unsigned thread = 0; thread < num_cluster_blocks() * block_dim.x; ++thread) {
    known_to[thread].clear();
    fenced_at_block_barrier[thread] = 0;
  }
}

Time now() { return time_now; }

void release(Knowledge& to) {
  Knowledge& own = known_to[running_thread];
  own.done[running_thread] = ++time_now;
  to.add(own);
  if (num_cluster_blocks() == 1) return;
  // Its own block knows by itself what its last barrier says.
  const int first = block_of_cluster() * static_cast<int>(block_dim.x);
  for (int thread = first; thread < first + static_cast<int>(block_dim.x); ++thread) {
    to.done[thread] = std::max(to.done[thread], block_barriers[block_of_cluster()]);
  }
}

void acquire(const Knowledge& from) { acquire(running_thread, from); }

void acquire(int thread, const Knowledge& from) { known_to[thread].add(from); }

void release_copies(int mbarrier_idx, Knowledge& to) { to.done[copies_of(mbarrier_idx)] = ++time_now; }

void fence() { known_to[running_thread].fenced[running_thread] = ++time_now; }

void on_block_barrier(int block) {
  block_barriers[block] = ++time_now;
  for (unsigned thread = block * block_dim.x; thread < (block + 1) * block_dim.x; ++thread) {
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

bool is_over(Agent agent, Time time) { return is_over_for(running_thread, agent, time); }

bool is_over_for_any_of(int block, Agent agent, Time time) {
  const int first = block * static_cast<int>(block_dim.x);
  for (int thread = first; thread < first + static_cast<int>(block_dim.x); ++thread) {
    if (is_over_for(thread, agent, time)) return true;
  }
  return false;
}

bool is_fenced(Agent agent, Time time) {
  return time < known_to[running_thread].fenced[agent] || time < fenced_at_block_barrier[agent];
}

}  // namespace flash_attn::emulator::ordering
