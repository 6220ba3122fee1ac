// Kernels with one fault each, for a test of whether the emulator finds it: what SM90 kernels do by themselves while
// their threads go on.
#include <cstring>

#include "dev/emulator/faulty_kernels_sm90.h"

namespace flash_attn {
namespace {

// A warpgroup that computes, one whose first thread starts the copies, and one more, as registers are a matter of
// three.
constexpr int kNumThreads = 3 * kThreadsPerWarpgroup;
using RegisterMma = decltype(make_tiled_mma(
    GMMA::rs_op_selector<Element, Element, float, Shape<_64, _64, _64>, GMMA::Major::K, GMMA::Major::K>()));

bool is_copier() { return threadIdx.x == kThreadsPerWarpgroup; }
bool is_consumer() { return threadIdx.x < kThreadsPerWarpgroup; }

Storage& storage_with_barriers() {
  auto& smem = dynamic_smem<Storage>();
  if (threadIdx.x == 0) {
    smem.full.init(1);
    smem.empty.init(kThreadsPerWarpgroup / kThreadsPerWarp);
    sm90::fence_barrier_init();
  }
  __syncthreads();
  return smem;
}

void load(const CUtensorMap& map, sm90::Mbarrier& barrier, Element* to) {
  barrier.arrive_and_expect(kBoxBytes);
  sm90::load_box(map, sm90::CacheHint::EVICT_NORMAL, barrier, to, kAllRows);
}

void store(const CUtensorMap& map, const Element* from) {
  sm90::store_box(map, from, kAllRows);
  sm90::commit_stores();
}

void load_both(const CUtensorMap& map, Storage& smem) {
  smem.full.arrive_and_expect(2 * kBoxBytes);
  for (Element* to : {smem.a, smem.b}) {
    sm90::load_box(map, sm90::CacheHint::EVICT_NORMAL, smem.full, to, kAllRows);
  }
}

// ---- the kernels; `map` is of a tensor of kRows rows

void read_stage_before_its_barrier(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (is_copier()) load(map, smem.full, smem.a);
  if (is_consumer() && static_cast<float>(smem.a[threadIdx.x]) == 1.f) smem.b[0] = smem.a[0];
}

// No fault but the descriptor's, if it has one.
void load_no_row(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (!is_copier()) return;
  smem.full.arrive_and_expect(kBoxBytes);
  sm90::load_box(map, sm90::CacheHint::EVICT_NORMAL, smem.full, smem.a, {.row = sm90::kRowBound});
  smem.full.wait(0);
}

void multiply_stage_before_its_barrier(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (is_copier()) load_both(map, smem);
  if (!is_consumer()) return;
  Operands x = operands_of(smem);
  start(x);
  sm90::wait_for_gemms<0>(x.acc);
}

void overwrite_stage_in_use(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (is_copier()) {
    load_both(map, smem);
    smem.full.wait(0);
    load(map, smem.full, smem.b);
  }
  if (!is_consumer()) return;
  smem.full.wait(0);
  Operands x = operands_of(smem);
  start(x);
  sm90::wait_for_gemms<0>(x.acc);
}

void release_stage_before_products_end(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (is_copier()) {
    load_both(map, smem);
    smem.empty.wait(0);
    load(map, smem.full, smem.b);
  }
  if (!is_consumer()) return;
  smem.full.wait(0);
  Operands x = operands_of(smem);
  start(x);
  if (threadIdx.x % kThreadsPerWarp == 0) smem.empty.arrive();
  if (threadIdx.x == 0) smem.full.wait(1);
  sm90::wait_for_gemms<0>(x.acc);
}

void read_accumulator_before_wait(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (is_copier()) load_both(map, smem);
  if (!is_consumer()) return;
  smem.full.wait(0);
  Operands x = operands_of(smem);
  start(x);
  smem.a[0] = Element(x.acc(0));
}

void write_operand_before_wait(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (is_copier()) load_both(map, smem);
  if (!is_consumer()) return;
  smem.full.wait(0);
  Operands x = operands_of(smem);
  RegisterMma mma;
  Tensor a = make_tensor<Element>(Shape<Shape<_2, _2, _2>, _1, _4>{});
  clear(a);
  sm90::start_gemm(mma, a, x.b, x.acc, GMMA::ScaleOut::Zero);
  a(0) = Element(1.f);
  sm90::wait_for_gemms<0>(x.acc);
}

void return_before_wait(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (is_copier()) load_both(map, smem);
  if (!is_consumer()) return;
  smem.full.wait(0);
  Operands x = operands_of(smem);
  start(x);
}

void store_without_fence(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  for (int i = threadIdx.x; i < kRows * kCols; i += kNumThreads) smem.a[i] = Element(0.f);
  __syncthreads();
  if (!is_copier()) return;
  store(map, smem.a);
  sm90::wait_for_stores();
}

void overwrite_what_is_stored(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  for (int i = threadIdx.x; i < kRows * kCols; i += kNumThreads) smem.a[i] = Element(0.f);
  sm90::fence_smem_writes();
  __syncthreads();
  if (is_copier()) store(map, smem.a);
  __syncthreads();
  smem.a[threadIdx.x] = Element(1.f);
  if (is_copier()) sm90::wait_for_stores();
}

void copy_with_an_unfenced_barrier(CUtensorMap map) {
  auto& smem = dynamic_smem<Storage>();
  if (threadIdx.x == 0) smem.full.init(1);
  __syncthreads();
  if (is_copier()) load(map, smem.full, smem.a);
}

void wait_for_a_phase_that_never_ends(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (is_copier()) load(map, smem.full, smem.a);
  if (!is_consumer()) return;
  smem.full.wait(0);
  smem.full.wait(1);
}

void arrive_too_often(CUtensorMap map) {
  Storage& smem = storage_with_barriers();
  if (!is_copier()) return;
  load(map, smem.full, smem.a);
  smem.full.arrive();
}

void wait_at_a_barrier_alone(CUtensorMap) {
  if (is_consumer()) sm90::wait_at_barrier(3, kNumThreads);
}

void write_without_a_turn(CUtensorMap) {
  auto& smem = dynamic_smem<Storage>();
  if (threadIdx.x == 0) smem.a[0] = Element(1.f);
  if (is_consumer()) {
    sm90::arrive_at_barrier(3, kNumThreads);
  } else {
    sm90::wait_at_barrier(3, kNumThreads);
  }
  if (is_copier()) smem.a[0] = Element(2.f);  // which is after that of thread 0
  if (threadIdx.x == 0) smem.a[0] = Element(3.f);
}

void take_registers_that_others_have(CUtensorMap) {
  if (is_consumer()) sm90::take_registers<240>();
}

struct FaultyKernel {
  const char* name;
  void (*kernel)(CUtensorMap);
};

constexpr FaultyKernel kFaultyKernels[] = {
    {"read_stage_before_its_barrier", &read_stage_before_its_barrier},
    {"load_no_row", &load_no_row},
    {"multiply_stage_before_its_barrier", &multiply_stage_before_its_barrier},
    {"overwrite_stage_in_use", &overwrite_stage_in_use},
    {"release_stage_before_products_end", &release_stage_before_products_end},
    {"read_accumulator_before_wait", &read_accumulator_before_wait},
    {"write_operand_before_wait", &write_operand_before_wait},
    {"return_before_wait", &return_before_wait},
    {"store_without_fence", &store_without_fence},
    {"overwrite_what_is_stored", &overwrite_what_is_stored},
    {"copy_with_an_unfenced_barrier", &copy_with_an_unfenced_barrier},
    {"wait_for_a_phase_that_never_ends", &wait_for_a_phase_that_never_ends},
    {"arrive_too_often", &arrive_too_often},
    {"wait_at_a_barrier_alone", &wait_at_a_barrier_alone},
    {"write_without_a_turn", &write_without_a_turn},
    {"take_registers_that_others_have", &take_registers_that_others_have},
};

}  // namespace
}  // namespace flash_attn

// What the emulator said, or "" if it found nothing. `tensor` has kRows x kCols bf16 elements.
extern "C" const char* flash_attn_run_faulty_sm90_kernel(const char* name, void* tensor) {
  using namespace flash_attn;
  CUtensorMap map;
  if (describe(tensor, map) != cudaSuccess) return "the descriptor is refused";
  for (const FaultyKernel& faulty : kFaultyKernels) {
    if (std::strcmp(faulty.name, name) != 0) continue;
    return emulator::said_of(
        [&] { emulator::run_blocks({1, kNumThreads, sizeof(Storage)}, [&] { faulty.kernel(map); }); });
  }
  return "there is no such kernel";
}
