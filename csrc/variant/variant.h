// The compile-time facts that tell one kernel from another. Host and device code share this header; it knows neither
// torch nor a kernel.
#pragma once

namespace flash_attn {

enum class Arch { kSm80 = 80, kSm90 = 90 };

enum class Dtype { kFp16, kBf16 };

// kFull sees every key; kCausal sees keys up to the diagonal that ends in the bottom-right corner; kGeneral a window
// around that diagonal, whose sides are run-time values and may be as wide as the sequence.
enum class Mask { kFull, kCausal, kGeneral };

// kPlain scales. kGeneral has softcap, ALiBi and dropout besides, each switched by a run-time value.
enum class Score { kPlain, kGeneral };

// A call runs in the smallest bucket that holds both of its head dims; columns past them are zero-filled.
struct HeadDimBucket {
  int qk;
  int v;

  friend constexpr bool operator==(const HeadDimBucket&, const HeadDimBucket&) = default;
};

// The shared memory that a kernel's thread blocks must be able to have: that of SM86 and SM89, of SM80, of SM90.
enum class SmemClass { k99KB = 99, k163KB = 163, k227KB = 227 };

constexpr int bytes_of(SmemClass smem) { return static_cast<int>(smem) * 1024; }

// Where the rows of a tile come from. kMany: the queries of one head, in large tiles. The others: small tiles for calls
// with few queries, whose rows may be those of all heads that share a key-value head, and whose keys may be split over
// thread blocks.
enum class Rows { kMany, k64, k16 };

// One forward kernel. A structural type, so that it is a template argument as well as a look-up key.
struct Variant {
  Arch arch;
  Dtype dtype;
  HeadDimBucket head_dim;
  SmemClass smem;
  Mask mask;
  Score score;
  Rows rows = Rows::kMany;

  friend constexpr bool operator==(const Variant&, const Variant&) = default;
};

constexpr const char* name_of(Dtype dtype) { return dtype == Dtype::kFp16 ? "fp16" : "bf16"; }
constexpr const char* name_of(Score score) { return score == Score::kPlain ? "plain" : "general"; }
constexpr const char* name_of(Rows rows) {
  switch (rows) {
    case Rows::kMany:
      return "many";
    case Rows::k64:
      return "64";
    default:
      return "16";
  }
}
constexpr const char* name_of(Mask mask) {
  switch (mask) {
    case Mask::kFull:
      return "full";
    case Mask::kCausal:
      return "causal";
    default:
      return "general";
  }
}

}  // namespace flash_attn
