// m64nNk16 for sizes N that CuTe has only in a header which takes 40 seconds to read: S = Q K' with both operands in
// shared memory along K, and O += P V with P in registers and V along its columns. The accumulator's registers are
// passed one by one, hence the lists.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <type_traits>

namespace flash_attn::sm90 {

// ITEM applied to tens * 10 + 0, ..., tens * 10 + 9, `tens` being written as digits.
#define FLASH_ATTN_TEN(ITEM, tens) \
  ITEM(tens##0)                    \
  ITEM(tens##1)                    \
  ITEM(tens##2) ITEM(tens##3) ITEM(tens##4) ITEM(tens##5) ITEM(tens##6) ITEM(tens##7) ITEM(tens##8) ITEM(tens##9)
#define FLASH_ATTN_EIGHT(ITEM, tens) \
  ITEM(tens##0) ITEM(tens##1) ITEM(tens##2) ITEM(tens##3) ITEM(tens##4) ITEM(tens##5) ITEM(tens##6) ITEM(tens##7)
// The first 39, 55, 79, 87 numbers, and what is left of 40, 56, 80, 88: lists have no comma after their last item.
#define FLASH_ATTN_LIST_80(ITEM) \
  FLASH_ATTN_TEN(ITEM, ) FLASH_ATTN_TEN(ITEM, 1) FLASH_ATTN_TEN(ITEM, 2) FLASH_ATTN_EIGHT(ITEM, 3) ITEM(38)
#define FLASH_ATTN_LIST_112(ITEM) \
  FLASH_ATTN_TEN(ITEM, )          \
  FLASH_ATTN_TEN(ITEM, 1)         \
  FLASH_ATTN_TEN(ITEM, 2) FLASH_ATTN_TEN(ITEM, 3) FLASH_ATTN_TEN(ITEM, 4) ITEM(50) ITEM(51) ITEM(52) ITEM(53) ITEM(54)
#define FLASH_ATTN_LIST_160(ITEM) \
  FLASH_ATTN_TEN(ITEM, )          \
  FLASH_ATTN_TEN(ITEM, 1)         \
  FLASH_ATTN_TEN(ITEM, 2)         \
  FLASH_ATTN_TEN(ITEM, 3)         \
  FLASH_ATTN_TEN(ITEM, 4) FLASH_ATTN_TEN(ITEM, 5) FLASH_ATTN_TEN(ITEM, 6) FLASH_ATTN_EIGHT(ITEM, 7) ITEM(78)
#define FLASH_ATTN_LIST_176(ITEM) \
  FLASH_ATTN_TEN(ITEM, )          \
  FLASH_ATTN_TEN(ITEM, 1)         \
  FLASH_ATTN_TEN(ITEM, 2)         \
  FLASH_ATTN_TEN(ITEM, 3)         \
  FLASH_ATTN_TEN(ITEM, 4)         \
  FLASH_ATTN_TEN(ITEM, 5)         \
  FLASH_ATTN_TEN(ITEM, 6) FLASH_ATTN_TEN(ITEM, 7) ITEM(80) ITEM(81) ITEM(82) ITEM(83) ITEM(84) ITEM(85) ITEM(86)

#define FLASH_ATTN_PARAMETER(i) float &d##i,
#define FLASH_ATTN_NAME(i) "%" #i ", "
#define FLASH_ATTN_OPERAND(i) "+f"(d##i),

template <class Element, int kN>
struct WgmmaSharedShared;
template <class Element, int kN>
struct WgmmaRegisterShared;

// `last` is N / 2 - 1, the operands after it are numbered `a` to `scale`.
#define FLASH_ATTN_WGMMA(kN, last, a, b, scale, Element, type)                                                      \
  template <>                                                                                                       \
  struct WgmmaSharedShared<Element, kN> {                                                                           \
    using DRegisters = void;                                                                                        \
    using ARegisters = uint64_t[1];                                                                                 \
    using BRegisters = uint64_t[1];                                                                                 \
    using CRegisters = float[kN / 2];                                                                               \
    CUTE_DEVICE static void fma(const uint64_t& desc_a, const uint64_t& desc_b,                                     \
                                FLASH_ATTN_LIST_##kN(FLASH_ATTN_PARAMETER) float& d##last,                          \
                                cute::GMMA::ScaleOut scale_d = cute::GMMA::ScaleOut::One) {                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN        \
                   "k16.f32." type "." type " {" FLASH_ATTN_LIST_##kN(FLASH_ATTN_NAME) "%" #last "}, %" #a ", %" #b \
                                                                                       ", p, 1, 1, 0, 0;\n}\n"      \
                   : FLASH_ATTN_LIST_##kN(FLASH_ATTN_OPERAND) "+f"(d##last)                                         \
                   : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(scale_d)));                                     \
    }                                                                                                               \
  };
#define FLASH_ATTN_WGMMA_TYPES(kN, last, a, b, scale)             \
  FLASH_ATTN_WGMMA(kN, last, a, b, scale, cutlass::half_t, "f16") \
  FLASH_ATTN_WGMMA(kN, last, a, b, scale, cutlass::bfloat16_t, "bf16")

FLASH_ATTN_WGMMA_TYPES(80, 39, 40, 41, 42)
FLASH_ATTN_WGMMA_TYPES(112, 55, 56, 57, 58)
FLASH_ATTN_WGMMA_TYPES(160, 79, 80, 81, 82)
FLASH_ATTN_WGMMA_TYPES(176, 87, 88, 89, 90)

#define FLASH_ATTN_WGMMA_RS(kN, last, a0, a1, a2, a3, b, scale, Element, type)                                         \
  template <>                                                                                                          \
  struct WgmmaRegisterShared<Element, kN> {                                                                            \
    using DRegisters = void;                                                                                           \
    using ARegisters = uint32_t[4];                                                                                    \
    using BRegisters = uint64_t[1];                                                                                    \
    using CRegisters = float[kN / 2];                                                                                  \
    CUTE_DEVICE static void fma(const uint32_t& a0_, const uint32_t& a1_, const uint32_t& a2_, const uint32_t& a3_,    \
                                const uint64_t& desc_b, FLASH_ATTN_LIST_##kN(FLASH_ATTN_PARAMETER) float& d##last,     \
                                cute::GMMA::ScaleOut scale_d = cute::GMMA::ScaleOut::One) {                            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN           \
                   "k16.f32." type "." type " {" FLASH_ATTN_LIST_##kN(FLASH_ATTN_NAME) "%" #last "}, {%" #a0 ", %" #a1 \
                                                                                       ", %" #a2 ", %" #a3 "}, %" #b   \
                                                                                       ", p, 1, 1, 1;\n}\n"            \
                   : FLASH_ATTN_LIST_##kN(FLASH_ATTN_OPERAND) "+f"(d##last)                                            \
                   : "r"(a0_), "r"(a1_), "r"(a2_), "r"(a3_), "l"(desc_b), "r"(static_cast<int>(scale_d)));             \
    }                                                                                                                  \
  };
FLASH_ATTN_WGMMA_RS(160, 79, 80, 81, 82, 83, 84, 85, cutlass::half_t, "f16")
FLASH_ATTN_WGMMA_RS(160, 79, 80, 81, 82, 83, 84, 85, cutlass::bfloat16_t, "bf16")

#undef FLASH_ATTN_WGMMA_RS
#undef FLASH_ATTN_WGMMA_TYPES
#undef FLASH_ATTN_WGMMA
#undef FLASH_ATTN_OPERAND
#undef FLASH_ATTN_NAME
#undef FLASH_ATTN_PARAMETER
#undef FLASH_ATTN_LIST_176
#undef FLASH_ATTN_LIST_160
#undef FLASH_ATTN_LIST_112
#undef FLASH_ATTN_LIST_80
#undef FLASH_ATTN_EIGHT
#undef FLASH_ATTN_TEN

// The instruction for S = Q K' of a tile: CuTe's choice where it has one of this width.
template <class Element, class TileShape, bool kQueriesInRegisters>
auto select_score_product() {
  using cute::GMMA::Major;
  constexpr int kN = size<1>(TileShape{});
  if constexpr (kQueriesInRegisters) {
    return cute::GMMA::rs_op_selector<Element, Element, float, TileShape, Major::K, Major::K>();
  } else if constexpr (kN == 80 || kN == 112 || kN == 160 || kN == 176) {
    return WgmmaSharedShared<Element, kN>{};
  } else {
    return cute::GMMA::ss_op_selector<Element, Element, float, TileShape, Major::K, Major::K>();
  }
}
// The instruction for O += P V with P in registers.
template <class Element, class TileShape>
auto select_output_product() {
  using cute::GMMA::Major;
  constexpr int kN = size<1>(TileShape{});
  if constexpr (kN == 160) {
    return WgmmaRegisterShared<Element, kN>{};
  } else {
    return cute::GMMA::rs_op_selector<Element, Element, float, TileShape, Major::K, Major::MN>();
  }
}

}  // namespace flash_attn::sm90

namespace cute {

template <class Element, int kN>
struct MMA_Traits<flash_attn::sm90::WgmmaSharedShared<Element, kN>> {
  using ValTypeD = float;
  using ValTypeA = Element;
  using ValTypeB = Element;
  using ValTypeC = float;
  using FrgTypeA = GMMA::smem_desc<GMMA::Major::K>;
  using FrgTypeB = GMMA::smem_desc<GMMA::Major::K>;
  using Shape_MNK = Shape<_64, Int<kN>, _16>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ABLayout<64, 16>;
  using BLayout = GMMA::ABLayout<kN, 16>;
  using CLayout = Layout<Shape<Shape<_4, _8, _4>, Shape<_2, _2, Int<kN / 8>>>,
                         Stride<Stride<_128, _1, _16>, Stride<_64, _8, _512>>>;

  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};

template <class Element, int kN>
struct MMA_Traits<flash_attn::sm90::WgmmaRegisterShared<Element, kN>>
    : MMA_Traits<flash_attn::sm90::WgmmaSharedShared<Element, kN>> {
  using FrgTypeA = Element;
  using FrgTypeB = GMMA::smem_desc<GMMA::Major::MN>;
  using ALayout = GMMA::ALayout_64x16;
};

}  // namespace cute
