// When the copies of K and V to shared memory, which holds one tile of each, start and are waited for.
#pragma once

#include <type_traits>

#include "kernels/common/params.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/instructions.h"
#include "kernels/sm80/kv_tile_loader.h"

namespace flash_attn::sm80 {

using namespace cute;

// The tiles of one head, of which step n takes the n-th of K and of V. Where they lie in pages, these are looked up a
// step ahead.
template <class Traits>
class KvTiles {
 public:
  using Element = typename Traits::Element;
  using KLoader = KvTileLoader<Traits, Traits::kHeadDim>;
  using VLoader = KvTileLoader<Traits, Traits::kHeadDimV>;
  static_assert(WarpRows<Traits, Traits::kHeadDim>::kRows == WarpRows<Traits, Traits::kHeadDimV>::kRows,
                "a tile of V takes the pages that were looked up for K");

  __device__ KvTiles(const ForwardParams& params, const SeqInfo& seq, int head_idx, const KvRange& range,
                     typename Traits::SharedStorage& smem)
      : load_k_(KvRows<Element>(params.k, params.page, seq, head_idx), bounds_of(seq, range), params.heads.head_dim),
        load_v_(KvRows<Element>(params.v, params.page, seq, head_idx), bounds_of(seq, range), params.heads.head_dim_v),
        smem_(smem),
        last_step_(range.begin) {}

  __device__ void look_up(int n) { page_ = load_k_.look_up(n * Traits::kTileN); }
  __device__ void load_k(int n) const { load(load_k_, n, smem_.k); }
  __device__ void load_v(int n) const { load(load_v_, n, smem_.v); }
  // What step n - 1 takes; nothing, where step n is the last.
  __device__ void load_next_k(int n) const { load_next(load_k_, n, smem_.k); }
  __device__ void load_next_v(int n) const { load_next(load_v_, n, smem_.v); }

 private:
  static __device__ typename KLoader::Bounds bounds_of(const SeqInfo& seq, const KvRange& range) {
    if constexpr (Traits::kMask == Mask::kGeneral) {
      return range.seen;
    } else {
      return seq.seqlen_k;
    }
  }

  template <class Loader>
  __device__ void load(const Loader& loader, int n, Element* tile) const {
    loader.load(n * Traits::kTileN, page_, tile);
    cp_async_fence();
  }
  template <class Loader>
  __device__ void load_next(const Loader& loader, int n, Element* tile) const {
    if (n > last_step_) {
      load(loader, n - 1, tile);
    } else {
      cp_async_fence();
    }
  }

  KLoader load_k_;
  VLoader load_v_;
  typename Traits::SharedStorage& smem_;
  int last_step_;
  int page_ = 0;  // that this lane knows of the tile that is loaded next
};

// V(n) arrives while S = Q K(n)' is computed, K(n - 1) while O += P V(n) is.
template <class Traits>
class LoadsInTurn {
 public:
  __device__ explicit LoadsInTurn(const KvTiles<Traits>& tiles) : tiles_(tiles) {}

  // The caller's own copies before it land with the first K.
  __device__ void start(int n) {
    tiles_.look_up(n);
    tiles_.load_k(n);
  }
  __device__ void wait_for_k(int n) {
    cp_async_wait<0>();
    __syncthreads();  // K(n) has landed, and every warp is done with V(n + 1)
    tiles_.load_v(n);
    tiles_.look_up(n - 1);
  }
  __device__ void after_row_max(int) {}
  __device__ void wait_for_v(int n) {
    cp_async_wait<0>();
    __syncthreads();  // V(n) and the warps' shares of P are there, and every warp is done with K(n)
    tiles_.load_next_k(n);
  }
  __device__ void after_product(int) {}

 private:
  KvTiles<Traits> tiles_;
};

// Each copy starts as soon as its space is free, so that K and V are both under way nearly all the time. For few rows,
// where memory is the limit, and warps that share rows: they meet when they reduce S to row maxima, and K is free.
template <class Traits>
class LoadsAhead {
 public:
  __device__ explicit LoadsAhead(const KvTiles<Traits>& tiles) : tiles_(tiles) {}

  // The caller's own copies before it land with the first K.
  __device__ void start(int n) {
    tiles_.look_up(n);
    tiles_.load_k(n);
    tiles_.load_v(n);
  }
  __device__ void wait_for_k(int n) {
    tiles_.look_up(n - 1);
    cp_async_wait<1>();
    __syncthreads();  // K(n) has landed
  }
  // The reducer had a barrier: every warp is done with K(n).
  __device__ void after_row_max(int n) { tiles_.load_next_k(n); }
  __device__ void wait_for_v(int) {
    cp_async_wait<1>();
    __syncthreads();  // V(n) and the warps' shares of P are there
  }
  __device__ void after_product(int n) {
    __syncthreads();  // every warp is done with V(n) and P
    tiles_.load_next_v(n);
  }

 private:
  KvTiles<Traits> tiles_;
};

template <class Traits>
using KvPipeline =
    std::conditional_t<(Traits::kFewRows && Traits::kWarpsN > 1), LoadsAhead<Traits>, LoadsInTurn<Traits>>;

}  // namespace flash_attn::sm80
