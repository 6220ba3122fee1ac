// Where the producer takes K and V of one head of one sequence from, through TMA. Rows past the sequence arrive as
// zeros, so that 0 V is 0 whatever memory holds there.
#pragma once

#include "kernels/sm90/forward_traits.h"
#include "kernels/sm90/row_box.h"
#include "kernels/sm90/tensor_map.h"
#include "kernels/sm90/visited_keys.h"

namespace flash_attn::sm90 {

struct ForwardTensorMaps {
  TensorMap q;
  TensorMap k;
  TensorMap v;
  TensorMap o;
};

// Every tile of queries reads the same keys.
inline constexpr CacheHint kKvHint = CacheHint::EVICT_LAST;

// Rows one after the other, a fixed stride apart: one box for each 32 or 64 columns of a tile.
template <class Traits>
class RowKvSource {
 public:
  using Element = typename Traits::Element;

  __device__ RowKvSource(const ForwardParams& params, const ForwardTensorMaps& maps, const PackedTile& tile)
      : maps_(maps), seq_(tile.seq), head_idx_(tile.rows.first_head / params.heads.num_heads_per_kv) {}

  // A slice of columns of a tile of keys, to its place in the tile at `smem`.
  __device__ void load_k(int n_idx, int first_col, Mbarrier& barrier, Element* smem) const {
    box<Traits::kHeadDim>(maps_.k, n_idx)
        .template load<Traits::kKSliceCols, typename Traits::Cluster>(kKvHint, barrier, smem, first_col);
  }
  __device__ void load_v(int n_idx, int first_col, Mbarrier& barrier, Element* smem) const {
    box<Traits::kGroupCols>(maps_.v, n_idx)
        .template load<Traits::kGroupCols, typename Traits::Cluster>(kKvHint, barrier, smem, first_col);
  }

 private:
  template <int kCols>
  __device__ auto box(const TensorMap& map, int n_idx) const {
    const int n_begin = n_idx * Traits::kTileN;
    return RowBox<Traits::kTileN, Traits::template kBoxCols<kCols>>(
        map, seq_.kv_batch_idx, head_idx_, seq_.row_begin_k + n_begin, seq_.seqlen_k - n_begin);
  }

  const ForwardTensorMaps& maps_;
  const SeqInfo& seq_;
  int head_idx_;
};

// Pages, in boxes of one page's rows each.
template <class Traits>
class PagedKvSource {
 public:
  using Element = typename Traits::Element;

  __device__ PagedKvSource(const ForwardParams& params, const ForwardTensorMaps& maps, const PackedTile& tile)
      : params_(params), maps_(maps), tile_(tile), head_idx_(tile.rows.first_head / params.heads.num_heads_per_kv) {}

  __device__ void load_k(int n_idx, int first_col, Mbarrier& barrier, Element* smem) const {
    load<Traits::kHeadDim, Traits::kKSliceCols>(maps_.k, n_idx, first_col, barrier, smem);
  }
  __device__ void load_v(int n_idx, int first_col, Mbarrier& barrier, Element* smem) const {
    load<Traits::kGroupCols, Traits::kGroupCols>(maps_.v, n_idx, first_col, barrier, smem);
  }

 private:
  template <int kCols, int kNumCols>
  __device__ void load(const TensorMap& map, int n_idx, int first_col, Mbarrier& barrier, Element* smem) const {
    constexpr int kBoxCols = Traits::template kBoxCols<kCols>;
    using Box = RowBox<Traits::kTileN, kBoxCols>;
    const auto start = [&](const Box& box, int row) {
      box.template load<kNumCols, typename Traits::Cluster>(kKvHint, barrier, smem + row * kBoxCols, first_col);
    };
    const FastDivisor& page_size = params_.page.page_size;
    const int box_rows = page_box_rows(page_size.divisor(), Traits::kTileN);
    const int first_token = static_cast<int>(tile_.seq.row_begin_k) + n_idx * Traits::kTileN;
    int table_idx = page_size.divide(first_token);
    int page = page_at(table_idx);
    int row_of_page = first_token - table_idx * page_size.divisor();
    // Keys left, this box's included. The first box has at least one; a box with none is all zeros, so its page doesn't
    // matter.
    int num_keys = tile_.seq.seqlen_k - n_idx * Traits::kTileN;
    for (int row = 0; row < Traits::kTileN; row += box_rows) {
      if (row_of_page >= page_size.divisor() && num_keys > 0) {
        page = page_at(++table_idx);
        row_of_page = 0;
      }
      const int num_zeros = n_idx == 0 && row == 0 ? num_unseen() : 0;
      if (num_zeros > 0) {
        start(Box::with_zeros(map, page, head_idx_, row_of_page, num_zeros), row);
      } else {
        start({map, page, head_idx_, row_of_page, clamp_to(num_keys, 0, box_rows)}, row);
      }
      row_of_page += box_rows;
      num_keys -= box_rows;
    }
  }
  // What the table's row of the entry says, clamped, so that no address leaves the pool.
  __device__ int page_at(int table_idx) const {
    const PageParams& page = params_.page;
    const int named = __ldg(page.table + tile_.seq.kv_batch_idx * page.table_stride + table_idx);
    return clamp_to(named, 0, page.num_pages - 1);
  }
  // How many keys of the first box no row sees; none where the box has the tile's last key (first_counted_key).
  __device__ int num_unseen() const {
    return PackedKeys<Traits::kMask>{{tile_.seq, params_.window}, tile_.rows}.begin(tile_.m_begin);
  }

  const ForwardParams& params_;
  const ForwardTensorMaps& maps_;
  const PackedTile& tile_;
  int head_idx_;
};

}  // namespace flash_attn::sm90
