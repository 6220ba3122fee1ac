// Consumer groups start some of their work one after the other, so that the softmax of one runs beside the products of
// another (FlashAttention-3 calls it ping-pong scheduling).
#pragma once

#include "kernels/sm90/barriers.h"
#include "variant/tiles.h"

namespace flash_attn::sm90 {

// No group waits for another.
struct NoTurns {
  // How many of a tile's steps take none.
  static constexpr int kStepsWithoutTurn = 0;

  static __device__ void open(int) {}
  // Around the start of a step's two products.
  static __device__ void before_products(int) {}
  static __device__ void after_products(int) {}
  static __device__ void before_exponentials(int) {}
  static __device__ void after_exponentials(int) {}
  // Takes the turn of a step that the group skips.
  static __device__ void skip(int) {}
};

// The ring of groups. One group alone has no turns.
template <int kNumGroups>
class TurnRing : public NoTurns {
  static_assert(kNumGroups > 1 && kNumGroups <= kMaxConsumerGroups);
  static constexpr int kNumThreads = 2 * kThreadsPerWarpgroup;

 public:
  // The last group opens the ring by passing the first turn.
  static __device__ void open(int group) {
    if (group == kNumGroups - 1) pass(group);
  }
  static __device__ void skip(int group) {
    wait(group);
    pass(group);
  }

 protected:
  static __device__ void wait(int group) { wait_at(NamedBarrier::kTurn, group, kNumThreads); }
  static __device__ void pass(int group) {
    arrive_at(NamedBarrier::kTurn, group + 1 == kNumGroups ? 0 : group + 1, kNumThreads);
  }
};

template <int kNumGroups>
struct TurnsAtProducts : TurnRing<kNumGroups> {
  // A tile's first products, which nothing else overlaps, need none.
  static constexpr int kStepsWithoutTurn = 1;

  static __device__ void before_products(int group) { TurnsAtProducts::wait(group); }
  static __device__ void after_products(int group) { TurnsAtProducts::pass(group); }
};

template <int kNumGroups>
struct TurnsAtExponentials : TurnRing<kNumGroups> {
  static __device__ void before_exponentials(int group) { TurnsAtExponentials::wait(group); }
  static __device__ void after_exponentials(int group) { TurnsAtExponentials::pass(group); }
};

// As the tile's row says.
template <Turn kTurn, int kNumGroups>
struct SelectTurns {
  using type = NoTurns;
};
template <int kNumGroups>
  requires(kNumGroups > 1)
struct SelectTurns<Turn::kProducts, kNumGroups> {
  using type = TurnsAtProducts<kNumGroups>;
};
template <int kNumGroups>
  requires(kNumGroups > 1)
struct SelectTurns<Turn::kExponentials, kNumGroups> {
  using type = TurnsAtExponentials<kNumGroups>;
};

template <class Traits>
using TurnsOf = typename SelectTurns<Traits::kTile.turn, Traits::kNumConsumerGroups>::type;

}  // namespace flash_attn::sm90
