// Where the rows of one head of K or V lie: one after another, or in pages.
#pragma once

#include "kernels/common/params.h"
#include "kernels/common/seq_info.h"

namespace flash_attn {

template <class Element>
class KvRows {
 public:
  __device__ KvRows(const Operand& operand, const PageParams& page, const SeqInfo& seq, int head_idx)
      : head_(static_cast<const Element*>(operand.ptr) + head_idx * operand.head_stride),
        row_stride_(operand.row_stride) {
    if (page.table == nullptr) {
      head_ += seq.kv_batch_idx * operand.batch_stride + seq.row_begin_k * operand.row_stride;
      return;
    }
    pages_ = page.table + seq.kv_batch_idx * page.table_stride;
    page_stride_ = operand.batch_stride;
    page_size_ = page.page_size;
    last_page_ = page.num_pages - 1;
    first_row_ = static_cast<int>(seq.row_begin_k);
  }

  __device__ bool in_pages() const { return pages_ != nullptr; }
  __device__ const Element* head() const { return head_; }
  __device__ int64_t row_stride() const { return row_stride_; }

  // A row that is in use, where there are pages; no id leads out of the pool, whatever the table holds.
  __device__ const Element* row(int key) const {
    const int token = first_row_ + key;
    const int page_idx = page_size_.divide(token);
    const int page = detail::clamp_to(__ldg(pages_ + page_idx), 0, last_page_);
    return head_ + page * page_stride_ + (token - page_idx * page_size_.divisor()) * row_stride_;
  }

 private:
  const Element* head_;  // with pages: of the pool
  int64_t row_stride_;
  const int* pages_ = nullptr;  // the entry's row of the table
  int64_t page_stride_ = 0;
  FastDivisor page_size_;
  int last_page_ = 0;
  int first_row_ = 0;  // the token that key 0 is
};

}  // namespace flash_attn
