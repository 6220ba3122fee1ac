#include "dev/emulator/tma.h"

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "dev/emulator/barriers.h"
#include "dev/emulator/cluster.h"
#include "dev/emulator/memory_check.h"
#include "dev/emulator/swizzle.h"
#include "dev/emulator/tensor_memory.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {
namespace {

constexpr int kRank = 5;
constexpr int kElementBytes = 2;
constexpr uint32_t kPieceBytes = 16;

// What a descriptor of ours holds; the driver's own is opaque.
struct Descriptor {
  uintptr_t base;
  std::array<uint64_t, kRank> sizes;
  std::array<uint64_t, kRank> strides;  // in bytes
  std::array<uint32_t, kRank> box;
  Swizzle swizzle;

  uint32_t row_bytes() const { return box[0] * kElementBytes; }
  uint32_t num_rows() const { return std::accumulate(box.begin() + 1, box.end(), 1u, std::multiplies<>()); }
};
static_assert(sizeof(Descriptor) <= sizeof(CUtensorMap));

Descriptor descriptor_of(const CUtensorMap& map) {
  Descriptor descriptor;
  std::memcpy(&descriptor, &map, sizeof descriptor);
  return descriptor;
}

struct Box {
  Descriptor descriptor;
  unsigned char* smem;
  BoxOrigin origin;
};

struct Stores {
  std::vector<Box> started;
  std::vector<Box> committed;
};

Stores stores_of_threads[kMaxThreads];

bool is_unit_of_16_bytes(uint64_t bytes) { return bytes % 16 == 0; }

// Calls visit(smem, global, num_bytes) for each piece of a row, `global` being null where the piece lies outside of the
// tensor; a piece may lie in it with its first bytes only.
template <class Visit>
void for_each_piece(const Box& box, const Visit& visit) {
  const Descriptor& map = box.descriptor;
  unsigned char* const smem = memory::smem_of(memory::block_of_smem(box.smem));
  const auto first_byte = static_cast<uint32_t>(box.smem - smem);
  for (uint32_t row = 0; row < map.num_rows(); ++row) {
    uintptr_t row_begin = map.base;
    bool is_inside = true;
    uint32_t left = row;
    for (int dim = 1; dim < kRank; ++dim) {
      const int64_t at = box.origin.at[dim] + static_cast<int64_t>(left % map.box[dim]);
      left /= map.box[dim];
      is_inside = is_inside && at >= 0 && at < static_cast<int64_t>(map.sizes[dim]);
      row_begin += at * map.strides[dim];
    }
    for (uint32_t byte = 0; byte < map.row_bytes(); byte += kPieceBytes) {
      const int64_t column = box.origin.at[0] + byte / kElementBytes;
      const int64_t num_inside = static_cast<int64_t>(map.sizes[0]) - column;
      const bool has_elements = is_inside && column >= 0 && num_inside > 0;
      const uint32_t offset = swizzled(first_byte + row * map.row_bytes() + byte, map.swizzle);
      visit(smem + offset,
            has_elements ? reinterpret_cast<unsigned char*>(row_begin + column * kElementBytes) : nullptr,
            num_inside < kPieceBytes / kElementBytes ? static_cast<uint32_t>(num_inside) * kElementBytes : kPieceBytes);
    }
  }
}

Box box_at(const CUtensorMap& map, const void* smem, const BoxOrigin& origin) {
  const Box box{descriptor_of(map), static_cast<unsigned char*>(const_cast<void*>(smem)), origin};
  const auto offset = static_cast<uintptr_t>(box.smem - memory::smem());
  if (offset >= memory::kMaxSmemBytes) fail("copies a box to or from what is not shared memory");
  if (offset % period_of(box.descriptor.swizzle) != 0) fail("copies a box at an address that its swizzle can't have");
  return box;
}

// Loads, but not stores, are said to want memory where the descriptor's tensor begins, even if they read none of it (a
// comment in QuACK's copy_utils.py).
void check_base(const Descriptor& descriptor) {
  if (!tensor_memory::may_touch(descriptor.base, 1)) fail("loads by a descriptor that begins outside of any tensor");
}

void land(const Box& box, int mbarrier_idx) {
  for_each_piece(box, [&](unsigned char* smem, const unsigned char* from, uint32_t num_bytes) {
    std::memset(smem, 0, kPieceBytes);
    if (from != nullptr) std::memcpy(smem, from, num_bytes);
    memory::end_async_write(smem, kPieceBytes, mbarrier_idx);
  });
  complete_bytes(mbarrier_idx, static_cast<int>(box.descriptor.num_rows() * box.descriptor.row_bytes()));
}

}  // namespace

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  constexpr uint64_t kMaxSize = uint64_t{1} << 32;
  constexpr uint64_t kMaxStride = uint64_t{1} << 40;
  constexpr uint32_t kMaxBox = 256;
  const bool has_16_bits = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const bool has_swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_64B || swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (rank != kRank || !has_16_bits || !has_swizzle) return CUDA_ERROR_INVALID_VALUE;
  Descriptor descriptor{
      .base = reinterpret_cast<uintptr_t>(base),
      .sizes = {},
      .strides = {kElementBytes},
      .box = {},
      .swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? Swizzle::k128 : Swizzle::k64,
  };
  if (base == nullptr || !is_unit_of_16_bytes(descriptor.base)) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * kElementBytes != static_cast<uint32_t>(descriptor.swizzle)) return CUDA_ERROR_INVALID_VALUE;
  for (int dim = 0; dim < kRank; ++dim) {
    if (sizes[dim] == 0 || sizes[dim] > kMaxSize || box[dim] == 0 || box[dim] > kMaxBox) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    descriptor.sizes[dim] = sizes[dim];
    descriptor.box[dim] = box[dim];
    if (dim == 0) continue;
    const uint64_t stride = strides[dim - 1];
    if (!is_unit_of_16_bytes(stride) || stride >= kMaxStride) return CUDA_ERROR_INVALID_VALUE;
    descriptor.strides[dim] = stride;
  }
  std::memcpy(map, &descriptor, sizeof descriptor);
  return CUDA_SUCCESS;
}

void drop_tma_copies() {
  for (Stores& stores : stores_of_threads) {
    stores.started.clear();
    stores.committed.clear();
  }
}

void start_box_load(const CUtensorMap& map, void* mbarrier, void* smem, const BoxOrigin& origin) {
  start_box_multicast(map, mbarrier, smem, 1u << block_of_cluster(), origin);
}

void start_box_multicast(const CUtensorMap& map, void* mbarrier, void* smem, unsigned blocks, const BoxOrigin& origin) {
  if (blocks == 0 || blocks >> num_cluster_blocks() != 0) fail("copies a box to blocks that its cluster hasn't got");
  Box box = box_at(map, smem, origin);
  check_base(box.descriptor);
  for (int block = 0; block < num_cluster_blocks(); ++block) {
    if ((blocks >> block & 1) == 0) continue;
    begin_copy_to_block(block);
    const int mbarrier_idx = mbarrier_for_copy(memory::in_block(block, mbarrier));
    box.smem = static_cast<unsigned char*>(memory::in_block(block, smem));
    for_each_piece(box, [](unsigned char* to, const unsigned char* from, uint32_t num_bytes) {
      if (from != nullptr) memory::read(from, num_bytes);
      memory::begin_async_write(to, kPieceBytes);
    });
    happen_later([=] { land(box, mbarrier_idx); });
  }
}

void start_box_store(const CUtensorMap& map, const void* smem, const BoxOrigin& origin) {
  const Box box = box_at(map, smem, origin);
  for_each_piece(box, [](const unsigned char* from, unsigned char* to, uint32_t num_bytes) {
    if (to != nullptr) memory::write(to, num_bytes);
    memory::begin_async_read(from, kPieceBytes);
  });
  stores_of_threads[running_thread].started.push_back(box);
}

void commit_box_stores() {
  Stores& stores = stores_of_threads[running_thread];
  stores.committed.insert(stores.committed.end(), stores.started.begin(), stores.started.end());
  stores.started.clear();
}

void wait_for_box_stores() {
  std::vector<Box>& committed = stores_of_threads[running_thread].committed;
  for (const Box& box : committed) {
    for_each_piece(box, [](const unsigned char* from, unsigned char* to, uint32_t num_bytes) {
      if (to != nullptr) std::memcpy(to, from, num_bytes);
      memory::end_async_read(running_thread, from, kPieceBytes);
    });
  }
  committed.clear();
}

void end_thread_of_tma() {
  const Stores& stores = stores_of_threads[running_thread];
  if (!stores.started.empty() || !stores.committed.empty()) fail("returns while its stores read shared memory");
}

}  // namespace flash_attn::emulator
