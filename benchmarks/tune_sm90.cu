// Times one SM90 forward kernel with the tile that it is compiled for; benchmarks/tune_sm90.py runs it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/sm90/forward_launch.h"

namespace flash_attn {
namespace {

constexpr Variant kVariant{Arch::kSm90,       Dtype::kBf16, HeadDimBucket{HEAD_DIMS},
                           SmemClass::k227KB, Mask::MASK,   Score::kPlain};
using Traits = sm90::ForwardTraits<kVariant, Tile{TILE}>;
using Element = Traits::Element;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Values with the spread of a normal distribution: power, and so speed, depends on them.
__global__ void fill_random(Element* data, size_t size, unsigned seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < size; i += size_t{gridDim.x} * blockDim.x) {
    float sum = 0.f;
    unsigned state = seed ^ static_cast<unsigned>(i * 2654435761u);
    for (int draw = 0; draw < 4; ++draw) {
      state = (state ^ (state >> 16)) * 0x45D9F3Bu + draw;
      sum += static_cast<float>(state >> 8) / (1 << 24) - 0.5f;
    }
    data[i] = Element(sum * 1.73f);
  }
}

Element* allocate(size_t size, unsigned seed) {
  void* data = nullptr;
  check(cudaMalloc(&data, size * sizeof(Element)));
  fill_random<<<1024, 256>>>(static_cast<Element*>(data), size, seed);
  return static_cast<Element*>(data);
}

int time_kernel(int batch, int heads, int length) {
  constexpr int kWarmUps = 2;
  constexpr int kLaunches = 10;
  constexpr HeadDimBucket kDims = kVariant.head_dim;
  const int64_t rows = int64_t{batch} * length * heads;
  const auto operand = [&](int head_dim, unsigned seed) {
    return Operand{allocate(rows * head_dim, seed), int64_t{length} * heads * head_dim, int64_t{heads} * head_dim,
                   head_dim};
  };
  ForwardParams params{};
  params.q = operand(kDims.qk, 1);
  params.k = operand(kDims.qk, 2);
  params.v = operand(kDims.v, 3);
  params.o = operand(kDims.v, 4);
  void* lse = nullptr;
  check(cudaMalloc(&lse, rows * sizeof(float)));
  params.lse = {static_cast<float*>(lse), int64_t{heads} * length, length};
  params.heads = {heads, 1, kDims.qk, kDims.v};
  params.split.num_splits = 1;
  params.seq.batch = params.seq.num_cache_rows = batch;
  params.seq.rows_q = params.seq.rows_k = length;
  params.tiles_per_head = ceil_div(length, Traits::kClusterM);
  params.score.score_factor = 1.f;
  params.score.softmax_scale = 1.f / sqrtf(static_cast<float>(kDims.qk));
  int num_sms = 0;
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  const ForwardLaunchConfig config{params.tiles_per_head * Traits::Cluster::kNumBlocks * heads * batch,
                                   Traits::Cluster::kNumBlocks, num_sms, nullptr, nullptr};

  cudaEvent_t start, stop;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  for (int i = 0; i < kWarmUps; ++i) check(sm90::launch_forward_kernel<Traits>(params, config));
  check(cudaEventRecord(start));
  for (int i = 0; i < kLaunches; ++i) check(sm90::launch_forward_kernel<Traits>(params, config));
  check(cudaEventRecord(stop));
  check(cudaDeviceSynchronize());
  float milliseconds = 0.f;
  check(cudaEventElapsedTime(&milliseconds, start, stop));

  std::vector<Element> out(rows * kDims.v);
  check(cudaMemcpy(out.data(), params.o.ptr, out.size() * sizeof(Element), cudaMemcpyDeviceToHost));
  double total = 0.;
  for (const Element value : out) total += std::abs(static_cast<float>(value));
  std::printf("%f %.10g\n", milliseconds / kLaunches, total);
  return 0;
}

}  // namespace
}  // namespace flash_attn

int main(int, char** argv) {
  return flash_attn::time_kernel(std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3]));
}
