#include "dev/emulator/warpgroup_products.h"

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <algorithm>
#include <vector>

#include "dev/emulator/memory_check.h"
#include "dev/emulator/ordering.h"
#include "dev/emulator/swizzle.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {
namespace {

constexpr int kDepth = 16;  // columns of A
constexpr int kRowsOfWarp = 16;
constexpr int kMaxColumns = 256;
constexpr int kWarpsOfGroup = 4;
constexpr int kElementBytes = 2;
constexpr int kPieceElements = 8;
constexpr int kPieceBytes = kPieceElements * kElementBytes;

using Group = std::vector<Product>;

struct Products {
  Group started;
  std::vector<Group> committed;
};

Products products_of_threads[kMaxThreads];

Products& own() { return products_of_threads[running_thread]; }

// A matrix in shared memory as its descriptor says (PTX ISA, 'Matrix-descriptor'): eight rows of the swizzle's width,
// then the next eight.
class SharedMatrix {
 public:
  SharedMatrix(uint64_t descriptor, Major major)
      : start_(field(descriptor, 0)),
        leading_bytes_(field(descriptor, 16)),
        stride_bytes_(field(descriptor, 32)),
        major_(major) {
    constexpr int kTypeBit = 62;
    const uint64_t type = descriptor >> kTypeBit;
    if (type != 1 && type != 2) fail("a matrix descriptor with a swizzle of neither 64 nor 128 bytes");
    swizzle_ = type == 1 ? Swizzle::k128 : Swizzle::k64;
  }

  // The piece of 16 bytes that begins with element (row, depth): eight neighbours along the major dimension.
  const unsigned char* piece(int row, int depth) const {
    const int width = static_cast<int>(swizzle_) / kElementBytes;
    const int inner = major_ == Major::kK ? depth : row;
    const int outer = major_ == Major::kK ? row : depth;
    const int leading = major_ == Major::kK ? 0 : inner / width * static_cast<int>(leading_bytes_);
    const uint32_t offset = start_ + leading + inner % width * kElementBytes + outer % 8 * width * kElementBytes +
                            outer / 8 * stride_bytes_;
    return memory::smem() + swizzled(offset, swizzle_);
  }

  // Calls visit(piece, row, depth) for each piece of rows [first_row, first_row + num_rows).
  template <class Visit>
  void for_each_piece(int first_row, int num_rows, const Visit& visit) const {
    const int row_step = major_ == Major::kK ? 1 : kPieceElements;
    const int depth_step = major_ == Major::kK ? kPieceElements : 1;
    for (int row = first_row; row < first_row + num_rows; row += row_step) {
      for (int depth = 0; depth < kDepth; depth += depth_step) visit(piece(row, depth), row, depth);
    }
  }

  // Calls put(value, row, depth) for each element of the rows.
  template <class Element, class Put>
  void load(int first_row, int num_rows, const Put& put) const {
    for_each_piece(first_row, num_rows, [&](const unsigned char* piece, int row, int depth) {
      for (int i = 0; i < kPieceElements; ++i) {
        const auto value = static_cast<float>(reinterpret_cast<const Element*>(piece)[i]);
        major_ == Major::kK ? put(value, row, depth + i) : put(value, row + i, depth);
      }
    });
  }

 private:
  static uint32_t field(uint64_t descriptor, int bit) { return (descriptor >> bit & 0x3FFF) << 4; }

  uint32_t start_;
  uint32_t leading_bytes_;
  uint32_t stride_bytes_;
  Major major_;
  Swizzle swizzle_;
};

int first_lane_of_warp() { return running_thread / kWarpSize * kWarpSize; }

int first_row_of_warp() { return running_thread / kWarpSize % kWarpsOfGroup * kRowsOfWarp; }

// The pieces of shared memory that a warp's part of a product reads.
template <class Visit>
void for_each_piece(const Product& product, const Visit& visit) {
  const auto visit_piece = [&](const unsigned char* piece, int, int) { visit(piece); };
  if (product.a_registers == nullptr) {
    SharedMatrix(product.a, Major::kK).for_each_piece(first_row_of_warp(), kRowsOfWarp, visit_piece);
  }
  SharedMatrix(product.b, product.b_major).for_each_piece(0, product.n, visit_piece);
}

void lend_registers(const Product& product) {
  constexpr size_t kFragmentBytes = 4 * sizeof(uint32_t);
  if (product.a_registers != nullptr) {
    memory::lend({.begin = product.a_registers, .num_bytes = kFragmentBytes, .may_be_read = true});
  }
  memory::lend({.begin = product.acc, .num_bytes = product.n / 2 * sizeof(float), .may_be_read = false});
}

// Lane 4 g + t holds rows g and g + 8 of A and of the sums, and pairs of neighbours from 2 t on along the other axis.
template <class Element>
void load_a(const Product* const (&lanes)[kWarpSize], float (&a)[kRowsOfWarp][kDepth]) {
  const Product& first = *lanes[0];
  if (first.a_registers == nullptr) {
    const int first_row = first_row_of_warp();
    const auto put = [&](float value, int row, int depth) { a[row - first_row][depth] = value; };
    SharedMatrix(first.a, Major::kK).load<Element>(first_row, kRowsOfWarp, put);
    return;
  }
  constexpr int kElementsOfLane = 8;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < kElementsOfLane; ++i) {
      const auto bits = static_cast<uint16_t>(lanes[lane]->a_registers[i / 2] >> (i % 2 * 16));
      a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = static_cast<float>(Element::bitcast(bits));
    }
  }
}

template <class Element>
void multiply(const Product* const (&lanes)[kWarpSize]) {
  static float a[kRowsOfWarp][kDepth];
  static float b[kDepth][kMaxColumns];
  static float sums[kMaxColumns];
  const Product& first = *lanes[0];
  load_a<Element>(lanes, a);
  const auto put = [&](float value, int column, int depth) { b[depth][column] = value; };
  SharedMatrix(first.b, first.b_major).load<Element>(0, first.n, put);
  for (int row = 0; row < kRowsOfWarp; ++row) {
    std::fill_n(sums, first.n, 0.f);
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < first.n; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < first.n; ++column) {
      float& acc = lanes[row % 8 * 4 + column % 8 / 2]->acc[column / 8 * 4 + row / 8 * 2 + column % 2];
      acc = first.starts_at_zero ? sums[column] : acc + sums[column];
    }
  }
}

// The oldest group of all lanes of the running thread's warp; its shared memory is no longer in use.
void run_oldest_group(Products* const (&lanes)[kWarpSize]) {
  const size_t size = lanes[0]->committed.front().size();
  for (const Products* products : lanes) {
    if (products->committed.empty() || products->committed.front().size() != size) {
      fail("the lanes of a warp have not started the same matrix products");
    }
  }
  for (size_t idx = 0; idx < size; ++idx) {
    const Product* products[kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) products[lane] = &lanes[lane]->committed.front()[idx];
    products[0]->element == ProductElement::kFp16 ? multiply<cutlass::half_t>(products)
                                                  : multiply<cutlass::bfloat16_t>(products);
    for_each_piece(*products[0], [](const unsigned char* piece) {
      memory::end_async_read(first_lane_of_warp(), piece, kPieceBytes);
    });
  }
  for (Products* const products : lanes) products->committed.erase(products->committed.begin());
}

}  // namespace

void drop_products() {
  for (Products& products : products_of_threads) {
    products.started.clear();
    products.committed.clear();
  }
}

void start_product(const Product& product) {
  if (lane() == 0) {
    for_each_piece(product, [](const unsigned char* piece) { memory::begin_async_read(piece, kPieceBytes); });
  }
  lend_registers(product);
  own().started.push_back(product);
}

void commit_products() {
  own().committed.push_back(std::move(own().started));
  own().started.clear();
}

void wait_for_products(int num_groups_left) {
  struct Waiting {
    Products* products;
    int num_groups_left;
  } waiting{&own(), num_groups_left};
  meet_with(kAllLanes, waiting, [](unsigned, auto lane_of) {
    Products* lanes[kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane] = lane_of(lane).products;
    while (static_cast<int>(lanes[0]->committed.size()) > lane_of(0).num_groups_left) run_oldest_group(lanes);
    // What is still read by others may be what those that are done read, too.
    for (const Group& group : lanes[0]->committed) {
      for (const Product& product : group) {
        for_each_piece(product, [](const unsigned char* piece) {
          memory::continue_async_read(first_lane_of_warp(), piece, kPieceBytes);
        });
      }
    }
    ordering::on_products_wait(first_lane_of_warp());
  });
  memory::take_back_all();
  for (const Group& group : own().committed) {
    for (const Product& product : group) lend_registers(product);
  }
}

void end_thread_of_products() {
  if (!own().started.empty() || !own().committed.empty()) fail("returns while its matrix products are under way");
}

}  // namespace flash_attn::emulator
