// Where packed rows of Q and O lie, and how a tile of O's is stored.
#pragma once

#include "kernels/common/params.h"
#include "kernels/common/row_address.h"
#include "kernels/common/row_map.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/forward_traits.h"
#include "kernels/sm80/tile_loader.h"
#include "kernels/sm80/tile_store.h"

namespace flash_attn::sm80 {

using namespace cute;

// Where each packed row of Q or O begins.
template <class Element>
class PackedRowAddresses {
 public:
  __device__ PackedRowAddresses(const Operand& operand, const SeqInfo& seq, const PackedRows& rows)
      : entry_(row_of<Element>(operand, seq.batch_idx, seq.row_begin_q, 0)),
        row_stride_(operand.row_stride),
        head_stride_(operand.head_stride),
        rows_(rows) {}

  __device__ Element* row(int row) const {
    return entry_ + rows_.query(row) * row_stride_ + rows_.head(row) * head_stride_;
  }

 private:
  Element* entry_;
  int64_t row_stride_;
  int64_t head_stride_;
  PackedRows rows_;
};

template <class Traits, class AccO>
__device__ void store_packed_output(const ForwardParams& params, const PackedTile& tile,
                                    typename Traits::SharedStorage& smem, const AccO& tOrO) {
  using Element = typename Traits::Element;
  using Access = typename Traits::template Access<Traits::kHeadDimV>;
  round_to_smem<typename Traits::Mma, Traits::kTileM, Traits::kHeadDimV>(smem.q_or_o, tOrO);
  __syncthreads();
  const auto staged = Access::template place_in<Traits::kTileM>(smem.q_or_o);
  const PackedRowAddresses<Element> rows(params.o, tile.seq, tile.rows);
  CUTE_UNROLL
  for (int pass = 0; pass < Access::template num_passes<Traits::kTileM>(); ++pass) {
    const int row_idx = tile.m_begin + Access::row_of_pass(pass);
    if (row_idx >= tile.num_rows()) continue;
    store_parts<Access>(rows.row(row_idx) + Access::col_of_part(0), staged, pass, params.heads.head_dim_v);
  }
}

}  // namespace flash_attn::sm80
