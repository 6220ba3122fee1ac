// Brings tiles of K and V, whose rows lie one after another or in pages.
#pragma once

#include "kernels/common/kv_range.h"
#include "kernels/common/kv_rows.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/instructions.h"
#include "kernels/sm80/tile_loader.h"

namespace flash_attn::sm80 {

using namespace cute;

// The rows of a tile that a warp copies: kRows neighbouring ones in each pass, a lane its part of one of them. They are
// no more than the warp has lanes, so that each lane looks up one row's page, and the others get it by a shuffle.
template <class Traits, int kCols>
struct WarpRows {
  using Access = typename Traits::template Access<kCols>;
  static constexpr int kRows = kThreadsPerWarp / Access::kThreadsPerRow;
  static constexpr int kNumPasses = Access::template num_passes<Traits::kTileN>();
  static_assert(kRows * kNumPasses <= kThreadsPerWarp, "a lane would have to know more than one page");

  // The row within the tile whose page this lane knows.
  static __device__ int known() {
    const int lane = threadIdx.x % kThreadsPerWarp;
    const int first = threadIdx.x / kThreadsPerWarp * kRows;
    return min(lane / kRows, kNumPasses - 1) * Access::kRowsPerPass + first + lane % kRows;
  }
  // The lane that knows the page of the row that this one copies.
  static __device__ int lane_that_knows(int pass) {
    return pass * kRows + threadIdx.x % kThreadsPerWarp / Access::kThreadsPerRow;
  }
};

// K or V. Only kernels with the general mask meet pages, and keys before those that are seen.
template <class Traits, int kCols>
class KvTileLoader {
 public:
  using Element = typename Traits::Element;
  static constexpr bool kIsGeneral = Traits::kMask == Mask::kGeneral;
  using Bounds = std::conditional_t<kIsGeneral, RowsBetween, RowsBelow>;

  __device__ KvTileLoader(const KvRows<Element>& rows, const Bounds& bounds, int num_cols)
      : rows_(rows), bounds_(bounds), num_cols_(num_cols) {}

  // The page that this lane looks up for load() of the same tile, if there are pages. Nothing waits for it before
  // load() does.
  __device__ int look_up(int row_begin) const {
    if constexpr (kIsGeneral) {
      if (rows_.in_pages()) return rows_.page_of(bounds_.nearest(row_begin + WarpRows<Traits, kCols>::known()));
    }
    return 0;
  }

  // Starts the copy of the tile at `row_begin`; the caller fences and waits.
  __device__ void load(int row_begin, int page, Element* smem) const {
    if constexpr (kIsGeneral) {
      if (rows_.in_pages()) {
        load_from_pages(row_begin, page, smem);
        return;
      }
    }
    TileLoader<Traits, Traits::kTileN, kCols, Bounds>(rows_.head(), rows_.row_stride(), bounds_, num_cols_)
        .load(row_begin, smem);
  }

 private:
  __device__ void load_from_pages(int row_begin, int page, Element* smem) const {
    using WarpRows = WarpRows<Traits, kCols>;
    using Access = typename WarpRows::Access;
    const auto target = Access::template place_in<Traits::kTileN>(smem);
    const auto row_of_pass = [&](int pass) { return row_begin + Access::row_of_pass(pass); };
    const int64_t known = rows_.offset(bounds_.nearest(row_begin + WarpRows::known()), page);
    int64_t offsets[WarpRows::kNumPasses];
    CUTE_UNROLL
    for (int pass = 0; pass < WarpRows::kNumPasses; ++pass) {
      offsets[pass] = __shfl_sync(~0u, known, WarpRows::lane_that_knows(pass));
    }
    CUTE_UNROLL
    for (int pass = 0; pass < WarpRows::kNumPasses; ++pass) {
      const Element* source = rows_.head() + offsets[pass] + Access::col_of_part(0);
      CUTE_UNROLL
      for (int part = 0; part < Access::kNumParts; ++part) {
        AsyncCopy::copy(as_vector(source + part * Access::kPartCols),
                        as_vector(target.at(pass * Access::kRowsPerPass, part * Access::kPartCols)),
                        bounds_.contains(row_of_pass(pass)) && Access::col_of_part(part) < num_cols_);
      }
    }
  }

  KvRows<Element> rows_;
  Bounds bounds_;
  int num_cols_;
};

}  // namespace flash_attn::sm80
