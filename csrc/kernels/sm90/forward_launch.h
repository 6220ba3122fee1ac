// Starts an SM90 forward kernel. Each variant is instantiated in a file that variants.py generates.
#pragma once

#include <algorithm>
#include <numeric>

#include "kernels/common/launch.h"
#include "kernels/common/start_kernel.h"
#include "kernels/misc/merge_splits.h"
#include "kernels/sm90/forward_kernel.h"
#include "kernels/sm90/tensor_map.h"
#include "variant/rounding.h"

namespace flash_attn::sm90 {

// A tensor without elements has no address. Nothing of it is ever read, but a descriptor must have one.
inline Operand addressable(Operand operand, const Operand& other) {
  if (operand.ptr == nullptr) operand.ptr = other.ptr;
  return operand;
}

template <class Traits>
cudaError_t make_tensor_maps(const ForwardParams& params, ForwardTensorMaps& maps) {
  const HeadParams& heads = params.heads;
  const SeqParams& seq = params.seq;
  const int num_heads_kv = heads.num_heads / heads.num_heads_per_kv;
  const int packed_heads = params.split.packed_heads.divisor();
  struct Box {
    int rows;
    int heads;
    int cols;
  };
  const auto encode = [&](const Operand& operand, int batch, int num_rows, int num_heads, int head_dim, const Box& box,
                          TensorMap& map) {
    const TensorMapSpec spec{.operand = addressable(operand, params.o),
                             .num_rows = num_rows,
                             .num_heads = num_heads,
                             .batch = batch,
                             .head_dim = head_dim,
                             .box_rows = box.rows / box.heads,
                             .box_heads = box.heads,
                             .box_cols = box.cols};
    return encode_tensor_map(spec, Traits::kVariant.dtype, &map);
  };
  constexpr int kBoxQK = Traits::template kBoxCols<Traits::kHeadDim>;
  constexpr int kBoxV = Traits::template kBoxCols<Traits::kHeadDimV>;
  const bool has_pages = params.page.table != nullptr;
  const int page_size = params.page.page_size.divisor();
  const int entries_k = has_pages ? params.page.num_pages : seq.num_cache_rows;
  const int rows_k = has_pages ? page_size : seq.rows_k;
  const int box_rows_k = has_pages ? page_box_rows(page_size, Traits::kTileN) : Traits::kTileN;
  cudaError_t error = encode(params.q, seq.batch, seq.rows_q, heads.num_heads, heads.head_dim,
                             {Traits::kTileM, packed_heads, kBoxQK}, maps.q);
  if (error != cudaSuccess) return error;
  error = encode(params.k, entries_k, rows_k, num_heads_kv, heads.head_dim, {box_rows_k, 1, kBoxQK}, maps.k);
  if (error != cudaSuccess) return error;
  error = encode(params.v, entries_k, rows_k, num_heads_kv, heads.head_dim_v, {box_rows_k, 1, kBoxV}, maps.v);
  if (error != cudaSuccess) return error;
  return encode(params.o, seq.batch, seq.rows_q, heads.num_heads, heads.head_dim_v,
                {Traits::kGroupRows, packed_heads, kBoxV}, maps.o);
}

// The step with which each cluster comes by all places of a run in turn, so that none gets the short ones every time:
// an entry's last rows, or the tile without a partner.
inline int find_step(int num_clusters, int units_per_run) {
  for (int step = 0; step < num_clusters; ++step) {
    if (std::gcd(num_clusters + step, units_per_run) == 1) return step;
  }
  return 0;
}

// How many clusters run: as many as the GPU holds at a time, each of which loads its next tile while one ends; or,
// where lengths are on the device and there is no counter, as many as units.
template <class Traits>
int count_clusters(const ForwardParams& params, const ForwardLaunchConfig& config, int num_units) {
  if (params.seq.has_lengths() && config.tile_counter == nullptr) return num_units;
  return std::min(num_units, config.num_sms / Traits::Cluster::kNumBlocks);
}

template <class Traits>
TileOrder make_tile_order(const ForwardParams& params, const ForwardLaunchConfig& config) {
  const bool has_lengths = params.seq.has_lengths();
  const int num_runs = config.num_blocks / (params.tiles_per_head * Traits::Cluster::kNumBlocks);
  const bool pairs = Traits::kMask != Mask::kFull && !has_lengths;
  const int units_per_run = pairs ? ceil_div(params.tiles_per_head, 2) : params.tiles_per_head;
  const int num_units = num_runs * units_per_run;
  const int step = has_lengths ? 0 : find_step(count_clusters<Traits>(params, config, num_units), units_per_run);
  return {.num_units = num_units,
          .units_per_run = units_per_run,
          .step = step,
          .pairs = pairs,
          .num_splits = FastDivisor(params.split.num_splits),
          .counter = config.tile_counter};
}

template <class Traits>
cudaError_t launch_forward_kernel(const ForwardParams& params, const ForwardLaunchConfig& config) {
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const auto kernel = &forward_kernel<Traits>;
  // Compiled with another FLASH_ATTN_SM90_CLUSTER than the planner.
  if (config.cluster_blocks != Traits::Cluster::kNumBlocks) return cudaErrorInvalidConfiguration;
  ForwardTensorMaps maps;
  cudaError_t error = make_tensor_maps<Traits>(params, maps);
  if (error != cudaSuccess) return error;
  static SmemOptIn opt_in;
  error = opt_in.apply(reinterpret_cast<const void*>(kernel), kSmemBytes);
  if (error != cudaSuccess) return error;
  const TileOrder order = make_tile_order<Traits>(params, config);
  const int num_clusters = count_clusters<Traits>(params, config, order.num_units);
  if (order.counter != nullptr) {
    error = cudaMemsetAsync(order.counter, 0, sizeof(int), config.stream);
    if (error != cudaSuccess) return error;
  }
  const KernelLaunch launch{num_clusters * Traits::Cluster::kNumBlocks, Traits::kNumThreads, kSmemBytes, config.stream};
  if constexpr (Traits::Cluster::kNumBlocks > 1) {
    return start_clusters(kernel, launch, Traits::Cluster::kNumBlocks, params, maps, order);
  } else {
    start_kernel(kernel, launch, params, maps, order);
    if (params.split.entries == nullptr) return cudaGetLastError();
    return launch_merge_splits(params, Traits::kVariant.dtype, Traits::kTileM, config.stream);
  }
}

template <Variant kVariant>
cudaError_t launch_forward(const ForwardParams& params, const ForwardLaunchConfig& config) {
  return launch_forward_kernel<ForwardTraits<kVariant>>(params, config);
}

}  // namespace flash_attn::sm90
