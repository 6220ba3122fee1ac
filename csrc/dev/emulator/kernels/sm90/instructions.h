// The emulator's part of the instructions that the SM90 kernels are made of.
#pragma once

#include <cuda.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <type_traits>

#include "dev/emulator/barriers.h"
#include "dev/emulator/cluster.h"
#include "dev/emulator/ordering.h"
#include "dev/emulator/register_file.h"
#include "dev/emulator/tma.h"
#include "dev/emulator/warp_instructions.h"
#include "dev/emulator/warpgroup_products.h"
#include "kernels/sm90/tensor_map.h"
#include "variant/tiles.h"

namespace flash_attn::sm90 {

using namespace cute;

inline int warpgroup_idx() { return threadIdx.x / kThreadsPerWarpgroup; }
inline int warp_idx() { return threadIdx.x / emulator::kWarpSize; }
inline bool is_elected_lane() { return emulator::lane() == 0; }

template <int kRegisters>
void take_registers() {
  emulator::take_registers_up_to(kRegisters);
}
template <int kRegisters>
void give_up_registers() {
  emulator::give_up_registers_to(kRegisters);
}

inline void wait_at_barrier(int id, int num_threads) { emulator::wait_at_named_barrier(id, num_threads); }
inline void arrive_at_barrier(int id, int num_threads) { emulator::arrive_at_named_barrier(id, num_threads); }

inline int block_of_cluster() { return emulator::block_of_cluster(); }
inline void sync_cluster() {
  emulator::arrive_at_cluster_barrier();
  emulator::wait_at_cluster_barrier();
}

class Mbarrier {
 public:
  void init(int num_arrivals) { emulator::init_mbarrier(this, num_arrivals); }
  void arrive() { emulator::arrive_at_mbarrier(this); }
  void arrive_in_block(int block) { emulator::arrive_at_mbarrier_of_block(this, block); }
  void arrive_and_expect(int num_bytes) { emulator::arrive_and_expect_bytes(this, num_bytes); }
  void wait(unsigned parity) { emulator::wait_at_mbarrier(this, parity); }

 private:
  uint64_t state_;
};

inline void fence_barrier_init() { emulator::fence_mbarrier_init(); }

using CacheHint = TMA::CacheHintSm90;

// As tensor_map.h's descriptors count.
struct BoxCoord {
  int col;
  int head;
  int row;
  int row_end;
  int wraps = kRowBound;

  emulator::BoxOrigin origin() const { return {{col, head, row, row_end, wraps}}; }
};

inline void prefetch_descriptor(const CUtensorMap&) {}
inline void load_box(const CUtensorMap& map, CacheHint, Mbarrier& barrier, void* smem, const BoxCoord& at) {
  emulator::start_box_load(map, &barrier, smem, at.origin());
}
inline void load_box_to_blocks(const CUtensorMap& map, CacheHint, Mbarrier& barrier, void* smem, unsigned blocks,
                               const BoxCoord& at) {
  emulator::start_box_multicast(map, &barrier, smem, blocks, at.origin());
}
inline void store_box(const CUtensorMap& map, const void* smem, const BoxCoord& at) {
  emulator::start_box_store(map, smem, at.origin());
}
inline void commit_stores() { emulator::commit_box_stores(); }
inline void wait_for_stores() { emulator::wait_for_box_stores(); }
inline void fence_smem_writes() { emulator::ordering::fence(); }

inline void store_matrices(uint32_t a, uint32_t b, uint32_t c, uint32_t d, void* row) {
  emulator::store_matrices({a, b, c, d}, static_cast<uint128_t*>(row));
}

inline void load_matrices(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* row) {
  uint32_t own[4];
  emulator::load_matrices<emulator::MatrixOrder::kRows>(row, own);
  a = own[0];
  b = own[1];
  c = own[2];
  d = own[3];
}

template <class Fragment>
void fence_fragment(Fragment&) {}
template <class Fragment>
void hide_origin(Fragment&) {}
inline void fence_products() {}

// The major dimension of an operand in shared memory.
template <class Fragment>
struct MajorOf;
template <GMMA::Major kMajor>
struct MajorOf<GMMA::smem_desc<kMajor>> {
  static constexpr emulator::Major kValue = kMajor == GMMA::Major::MN ? emulator::Major::kMN : emulator::Major::kK;
};

template <class TiledMma, class FragA, class FragB, class Acc>
void start_product(const TiledMma& mma, const FragA& a, const FragB& b, Acc& acc) {
  constexpr bool kRegisterA = !is_base_of<GMMA::DescriptorIterator, typename TiledMma::FrgTypeA>::value;
  static_assert(decltype(size<1>(acc))::value == 1 && decltype(size<2>(acc))::value == 1,
                "one instruction, with the rows of one warpgroup");
  emulator::Product product{.element = std::is_same_v<typename TiledMma::ValTypeB, cutlass::half_t>
                                           ? emulator::ProductElement::kFp16
                                           : emulator::ProductElement::kBf16,
                            .n = decltype(size(acc))::value * 2,
                            .b = static_cast<uint64_t>(*b.data()),
                            .b_major = MajorOf<typename TiledMma::FrgTypeB>::kValue,
                            .starts_at_zero = mma.accumulate_ == GMMA::ScaleOut::Zero,
                            .acc = &acc(0)};
  if constexpr (kRegisterA) {
    product.a_registers = reinterpret_cast<const uint32_t*>(&a(0));
  } else {
    product.a = static_cast<uint64_t>(*a.data());
  }
  emulator::start_product(product);
}
inline void commit_products() { emulator::commit_products(); }
template <int kNumPending>
void wait_for_products() {
  emulator::wait_for_products(kNumPending);
}

}  // namespace flash_attn::sm90
