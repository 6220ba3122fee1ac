// Where the rows of one head of K or V lie: one after another, or in pages.
#pragma once

#include "kernels/common/params.h"
#include "kernels/common/seq_info.h"

namespace flash_attn {

template <class Element>
class KvRows {
 public:
  // What is the same for all thread blocks is copied as it is, pages or not: the compiler then reads it from the params
  // again instead of keeping it in registers.
  __device__ KvRows(const Operand& operand, const PageParams& page, const SeqInfo& seq, int head_idx)
      : head_(static_cast<const Element*>(operand.ptr) + head_idx * operand.head_stride),
        row_stride_(operand.row_stride),
        pages_(page.table == nullptr ? nullptr : page.table + seq.kv_batch_idx * page.table_stride),
        page_stride_(operand.batch_stride),
        page_size_(page.page_size),
        last_page_(page.num_pages - 1),
        first_row_(static_cast<int>(seq.row_begin_k)) {
    if (!in_pages()) head_ += seq.kv_batch_idx * operand.batch_stride + seq.row_begin_k * operand.row_stride;
  }

  __device__ bool in_pages() const { return pages_ != nullptr; }
  __device__ const Element* head() const { return head_; }
  __device__ int64_t row_stride() const { return row_stride_; }

  // With pages: what the table says about a key that is in use.
  __device__ int page_of(int key) const { return __ldg(pages_ + page_size_.divide(first_row_ + key)); }

  // From head() to that key. The page is clamped, so that no address leaves the pool, whatever the table holds.
  __device__ int64_t offset(int key, int page) const {
    const int token = first_row_ + key;
    const int row = token - page_size_.divide(token) * page_size_.divisor();
    return clamp_to(page, 0, last_page_) * page_stride_ + row * row_stride_;
  }

  __device__ const Element* row(int key) const { return head_ + offset(key, page_of(key)); }

 private:
  const Element* head_;  // with pages: of the pool
  int64_t row_stride_;
  const int* pages_;  // the entry's row of the table, or null
  int64_t page_stride_;
  FastDivisor page_size_;
  int last_page_;
  int first_row_;  // the token number of key 0
};

}  // namespace flash_attn
