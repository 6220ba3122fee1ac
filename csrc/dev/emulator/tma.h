// TMA: boxes of a tensor to and from shared memory, as a descriptor says. A load lands some time after it was started,
// a store has read its shared memory when its thread waited for it, and not before.
#pragma once

#include <cuda.h>

namespace flash_attn::emulator {

// Where a box begins, in elements, the innermost dimension first.
struct BoxOrigin {
  int at[5];
};

// Whether the host's thread has a context: the runtime's calls that need one give it one, the driver's don't.
inline thread_local bool has_context = false;

// cuTensorMapEncodeTiled, for tensors of five dimensions with 16-bit elements and swizzles of 64 and 128 bytes.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill);

// Forgets those of all threads of the cluster that ran before.
void drop_tma_copies();

// A copy by the running thread.
void start_box_load(const CUtensorMap& map, void* mbarrier, void* smem, const BoxOrigin& origin);
// A copy to the same place of each block of the cluster whose bit is set, with the barrier that lies there.
void start_box_multicast(const CUtensorMap& map, void* mbarrier, void* smem, unsigned blocks, const BoxOrigin& origin);
void start_box_store(const CUtensorMap& map, const void* smem, const BoxOrigin& origin);
void commit_box_stores();
void wait_for_box_stores();
// A thread returns: nothing of it may be under way.
void end_thread_of_tma();

}  // namespace flash_attn::emulator
