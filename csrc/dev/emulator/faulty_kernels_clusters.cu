// A kernel of clusters of two thread blocks, right but for one fault, for a test of whether the emulator finds it: each
// block brings one of two tiles to both, twice, and multiplies them.
#include <cstring>

#include "dev/emulator/faulty_kernels_sm90.h"

namespace flash_attn {
namespace {

constexpr int kNumClusterBlocks = 2;
constexpr int kNumThreads = 2 * kThreadsPerWarpgroup;
constexpr int kNumConsumerWarps = kThreadsPerWarpgroup / kThreadsPerWarp;
constexpr int kNumUses = 2;

enum class Fault {
  kNone,
  kStartsAlone,           // does not wait for the other block's barriers to be initialised
  kLeavesAtOnce,          // while a tile is on its way
  kLeavesAlone,           // does not wait for the other block's last arrivals
  kReleasesToItselfOnly,  // the other block's producer does not hear of it
  kReleasesEarly,         // to the other block before the products have ended
  kExpectsItsOwnBytes,    // not those that the other block brings
  kExpectsNothing,        // in the block that the other brings a tile to
  kForgetsItsBarrier,     // waits elsewhere
};

bool is_second() { return sm90::block_of_cluster() == 1; }

template <Fault kFault>
void bring(const CUtensorMap& map, Storage& smem) {
  constexpr unsigned kBothBlocks = 3;
  for (int use = 0; use < kNumUses; ++use) {
    smem.empty.wait(use % 2 ^ 1);
    if (kFault == Fault::kExpectsNothing && is_second()) {
      smem.full.arrive();
    } else {
      smem.full.arrive_and_expect(kFault == Fault::kExpectsItsOwnBytes ? kBoxBytes : 2 * kBoxBytes);
    }
    Element* const tile = is_second() ? smem.b : smem.a;
    sm90::load_box_to_blocks(map, sm90::CacheHint::EVICT_NORMAL, smem.full, tile, kBothBlocks, kAllRows);
  }
}

template <Fault kFault>
void multiply(Storage& smem) {
  const int lane = threadIdx.x % kThreadsPerWarp;
  const int own = sm90::block_of_cluster();
  for (int use = 0; use < kNumUses; ++use) {
    smem.full.wait(use % 2);
    Operands x = operands_of(smem);
    start(x);
    const bool releases_early = kFault == Fault::kReleasesEarly && lane < kNumClusterBlocks && lane != own;
    if (releases_early) smem.empty.arrive_in_block(lane);
    sm90::wait_for_gemms<0>(x.acc);
    if (kFault == Fault::kReleasesToItselfOnly) {
      if (lane == 0) smem.empty.arrive();
    } else if (lane < kNumClusterBlocks && !releases_early) {
      smem.empty.arrive_in_block(lane);
    }
  }
}

template <Fault kFault>
void exchange(CUtensorMap map) {
  auto& smem = dynamic_smem<Storage>();
  if (threadIdx.x == 0) {
    smem.full.init(1);
    smem.empty.init(kNumConsumerWarps * (kFault == Fault::kReleasesToItselfOnly ? 1 : kNumClusterBlocks));
    sm90::fence_barrier_init();
  }
  if (kFault == Fault::kStartsAlone) {
    __syncthreads();
  } else {
    sm90::sync_cluster();
  }
  if (kFault == Fault::kLeavesAtOnce && is_second()) return;
  if (threadIdx.x == kThreadsPerWarpgroup) bring<kFault>(map, smem);
  if (threadIdx.x < kThreadsPerWarpgroup) multiply<kFault>(smem);
  if (kFault == Fault::kForgetsItsBarrier && is_second()) sm90::wait_at_barrier(3, 2 * kNumThreads);
  if (kFault != Fault::kLeavesAlone) sm90::sync_cluster();
}

struct FaultyKernel {
  const char* name;
  void (*kernel)(CUtensorMap);
};

constexpr FaultyKernel kFaultyKernels[] = {
    {"none", &exchange<Fault::kNone>},
    {"starts_alone", &exchange<Fault::kStartsAlone>},
    {"leaves_at_once", &exchange<Fault::kLeavesAtOnce>},
    {"leaves_alone", &exchange<Fault::kLeavesAlone>},
    {"releases_to_itself_only", &exchange<Fault::kReleasesToItselfOnly>},
    {"releases_early", &exchange<Fault::kReleasesEarly>},
    {"expects_its_own_bytes", &exchange<Fault::kExpectsItsOwnBytes>},
    {"expects_nothing", &exchange<Fault::kExpectsNothing>},
    {"forgets_its_barrier", &exchange<Fault::kForgetsItsBarrier>},
};

}  // namespace
}  // namespace flash_attn

// What the emulator said, or "" if it found nothing. `tensor` has kRows x kCols bf16 elements.
extern "C" const char* flash_attn_run_faulty_cluster_kernel(const char* name, void* tensor) {
  using namespace flash_attn;
  CUtensorMap map;
  if (describe(tensor, map) != cudaSuccess) return "the descriptor is refused";
  for (const FaultyKernel& faulty : kFaultyKernels) {
    if (std::strcmp(faulty.name, name) != 0) continue;
    const emulator::Launch launch{kNumClusterBlocks, kNumThreads, sizeof(Storage), kNumClusterBlocks};
    return emulator::said_of([&] { emulator::run_blocks(launch, [&] { faulty.kernel(map); }); });
  }
  return "there is no such kernel";
}
