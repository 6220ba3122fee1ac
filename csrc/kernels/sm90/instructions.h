// Hardware operations of Hopper that C++ has no name for, each with its PTX instruction: barriers in shared memory, TMA
// (the tensor memory accelerator), a warpgroup's matrix products, register reallocation.
#pragma once

#include <cuda.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "kernels/sm90/tensor_map.h"
#include "variant/tiles.h"

namespace flash_attn::sm90 {

using namespace cute;

// ---- threads

// The same in all lanes, so that what depends on it is in uniform registers.
__device__ inline int warpgroup_idx() { return __shfl_sync(~0u, threadIdx.x / kThreadsPerWarpgroup, 0); }
__device__ inline int warp_idx() { return __shfl_sync(~0u, threadIdx.x / kThreadsPerWarp, 0); }

__device__ inline bool is_elected_lane() { return elect_one_sync(); }

// setmaxnreg.inc and .dec, by all threads of a warpgroup.
template <int kRegisters>
__device__ void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}
template <int kRegisters>
__device__ void give_up_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}

// ---- clusters of thread blocks, which reach each other's shared memory. A block must not leave before the others are
// done with its own.

__device__ inline int block_of_cluster() { return static_cast<int>(block_rank_in_cluster()); }

// All threads of all its blocks, wherever they are in the code.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- the hardware's 16 barriers of a thread block

__device__ inline void wait_at_barrier(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
__device__ inline void arrive_at_barrier(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// ---- barriers in shared memory, which count arrivals and bytes; a phase ends when none of either is missing

class Mbarrier {
 public:
  __device__ void init(int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(num_arrivals) : "memory");
  }
  __device__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory"); }
  // At the barrier at the same place in any block of the cluster.
  __device__ void arrive_in_block(int block) {
    asm volatile(
        "{\n"
        ".reg .b32 other;\n"
        "mapa.shared::cluster.u32 other, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [other];\n"
        "}\n" ::"r"(address()),
        "r"(block)
        : "memory");
  }
  // Arrives, and lets the phase wait for that many bytes.
  __device__ void arrive_and_expect(int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(num_bytes) : "memory");
  }
  // Waits until the phase of this parity has ended. A new barrier's first phase has parity 0.
  __device__ void wait(unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(address()),
        "r"(parity)
        : "memory");
  }
  __device__ uint64_t* get() { return &state_; }

 private:
  __device__ uint32_t address() { return cast_smem_ptr_to_uint(&state_); }

  uint64_t state_;
};

// Makes initialised barriers visible to TMA.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// ---- TMA

using CacheHint = TMA::CacheHintSm90;

// As tensor_map.h's descriptors count.
struct BoxCoord {
  int col;
  int head;
  int row;
  int row_end;
  int wraps = kRowBound;
};

__device__ inline void prefetch_descriptor(const CUtensorMap& map) {
  prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(&map));
}
__device__ inline void load_box(const CUtensorMap& map, CacheHint hint, Mbarrier& barrier, void* smem,
                                const BoxCoord& at) {
  SM90_TMA_LOAD_5D::copy(&map, barrier.get(), static_cast<uint64_t>(hint), smem, at.col, at.head, at.row, at.row_end,
                         at.wraps);
}
// To the same place of each block of the cluster whose bit is set, with the barrier that lies there.
__device__ inline void load_box_to_blocks(const CUtensorMap& map, CacheHint hint, Mbarrier& barrier, void* smem,
                                          unsigned blocks, const BoxCoord& at) {
  SM90_TMA_LOAD_MULTICAST_5D::copy(&map, barrier.get(), static_cast<uint16_t>(blocks), static_cast<uint64_t>(hint),
                                   smem, at.col, at.head, at.row, at.row_end, at.wraps);
}
__device__ inline void store_box(const CUtensorMap& map, const void* smem, const BoxCoord& at) {
  SM90_TMA_STORE_5D::copy(&map, smem, at.col, at.head, at.row, at.row_end, at.wraps);
}
// cp.async.bulk.commit_group and wait_group.read: the stores that this thread started since the last commit are one
// group; the wait is until all groups have read their shared memory.
__device__ inline void commit_stores() { tma_store_arrive(); }
__device__ inline void wait_for_stores() { tma_store_wait<0>(); }

// fence.proxy.async: TMA and the tensor cores can read what this thread wrote to shared memory.
__device__ inline void fence_smem_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// stmatrix: four matrices of 8 x 8 elements, of which each lane has two neighbours of a row; lane l has the address of
// row l % 8 of matrix l / 8.
__device__ inline void store_matrices(uint32_t a, uint32_t b, uint32_t c, uint32_t d, void* row) {
  SM90_U32x4_STSM_N::copy(a, b, c, d, *static_cast<uint128_t*>(row));
}

// ldmatrix, the same the other way round.
__device__ inline void load_matrices(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* row) {
  SM75_U32x4_LDSM_N::copy(*static_cast<const uint128_t*>(row), a, b, c, d);
}

// ---- matrix products of a warpgroup (wgmma). Between the fence before they start and the wait their registers belong
// to the tensor cores.

// Keeps the compiler from moving uses of the registers across; no instruction.
template <class Fragment>
__device__ void fence_fragment(Fragment& fragment) {
  warpgroup_fence_operand(fragment);
}
// Hides where the descriptors of an operand in shared memory come from: the compiler then adds each one's offset where
// it is used, and doesn't keep it in registers over the loop. No instruction.
template <class Fragment>
__device__ void hide_origin(Fragment& descriptors) {
  asm volatile("" : "+r"(descriptors.data().desc_.reg32_[0]));
}
// wgmma.fence: before the first product that reads or writes registers which this thread wrote.
__device__ inline void fence_products() { warpgroup_arrive(); }
// wgmma.mma_async: acc += a b over 16 columns of a.
template <class TiledMma, class FragA, class FragB, class Acc>
__device__ void start_product(const TiledMma& mma, const FragA& a, const FragB& b, Acc& acc) {
  gemm(mma, a, b, acc);
}
// wgmma.commit_group and wait_group.
__device__ inline void commit_products() { warpgroup_commit_batch(); }
template <int kNumPending>
__device__ void wait_for_products() {
  warpgroup_wait<kNumPending>();
}

}  // namespace flash_attn::sm90
