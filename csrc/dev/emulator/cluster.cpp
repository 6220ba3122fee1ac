#include "dev/emulator/cluster.h"

#include <algorithm>
#include <string>

#include "dev/emulator/meeting.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {
namespace {

struct ClusterBarrier {
  int num_arrived = 0;
  int num_phases = 0;  // that are over
  Meeting meeting;
};

struct Neighbours {
  int num_copies;                                // under way to this block
  ordering::Time touched[ordering::kMaxAgents];  // last, by each agent that isn't of this block
};

constexpr int kNone = -1;

ClusterBarrier barrier;
int num_alive_now;
int arrived_in_phase[kMaxThreads];  // of the barrier, each thread that has not waited since
Neighbours neighbours[kMaxClusterBlocks];

void open_if_all_came() {
  if (barrier.num_arrived == 0 || barrier.num_arrived < num_alive_now) return;
  barrier.num_arrived = 0;
  ++barrier.num_phases;
  barrier.meeting.end_phase();
}

std::string name_of(int block) { return "block " + std::to_string(block) + " of the cluster"; }

}  // namespace

void begin_cluster() {
  barrier.num_arrived = barrier.num_phases = 0;
  barrier.meeting.clear();
  num_alive_now = num_cluster_blocks() * static_cast<int>(block_dim.x);
  std::fill(std::begin(arrived_in_phase), std::end(arrived_in_phase), kNone);
  for (Neighbours& block : neighbours) {
    block.num_copies = 0;
    std::fill(std::begin(block.touched), std::end(block.touched), ordering::Time{0});
  }
}

void arrive_at_cluster_barrier() {
  int& phase = arrived_in_phase[running_thread];
  if (phase != kNone) fail("arrives at the cluster's barrier without having waited there since it last did");
  phase = barrier.num_phases;
  ++barrier.num_arrived;
  ordering::release(barrier.meeting.arrived);
  open_if_all_came();
}

void wait_at_cluster_barrier() {
  int& phase = arrived_in_phase[running_thread];
  if (phase == kNone) fail("waits at the cluster's barrier without having arrived there");
  const bool is_over = phase < barrier.num_phases;
  phase = kNone;
  if (is_over) return ordering::acquire(barrier.meeting.passed);
  barrier.meeting.waiting.push_back(running_thread);
  sleep("the cluster's barrier");
}

void end_thread_of_cluster(int num_alive) {
  num_alive_now = num_alive;
  if (arrived_in_phase[running_thread] != kNone) fail("returns without having waited at the cluster's barrier");
  open_if_all_came();
}

void touch_block(int block, ordering::Agent agent) {
  if (has_left(block)) fail("uses the shared memory of " + name_of(block) + ", which has left");
  neighbours[block].touched[agent] = ordering::now();
}

void begin_copy_to_block(int block) {
  if (has_left(block)) fail("copies to the shared memory of " + name_of(block) + ", which has left");
  ++neighbours[block].num_copies;
}

void end_copy_to_block(int block, ordering::Agent agent) {
  touch_block(block, agent);
  --neighbours[block].num_copies;
}

void check_leaving_block() {
  const int block = block_of_cluster();
  if (neighbours[block].num_copies > 0) fail("its block leaves while copies to its shared memory are under way");
  for (ordering::Agent agent = 0; agent < ordering::kMaxAgents; ++agent) {
    const ordering::Time time = neighbours[block].touched[agent];
    if (time == 0 || ordering::is_over_for_any_of(block, agent, time)) continue;
    fail(
        "its block leaves while others of the cluster may still use its shared memory: no barrier says that they are "
        "done");
  }
}

}  // namespace flash_attn::emulator
