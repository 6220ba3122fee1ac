#include "api/built_kernels.h"

#include <sstream>

#include "kernels/common/launch.h"

namespace flash_attn {
namespace {

// Items of a JSON list, with commas between them.
class JsonList {
 public:
  explicit JsonList(std::ostream& text) : text_(text) { text_ << "["; }
  ~JsonList() { text_ << "]"; }

  std::ostream& next() {
    if (count_++ > 0) text_ << ", ";
    return text_;
  }

 private:
  std::ostream& text_;
  int count_ = 0;
};

template <class Row, int kNumRows>
void write_tile_rows(std::ostream& json, const Row (&rows)[kNumRows]) {
  JsonList list(json);
  for (const Row& row : rows) {
    list.next() << "[" << row.head_dim.qk << ", " << row.head_dim.v << ", " << bytes_of(row.smem) << "]";
  }
}

// Kernels for few rows come with the others, in buckets of their own.
bool is_listed(const Variant& variant) { return variant.rows == Rows::kMany; }
bool is_listed(const BackwardVariant&) { return true; }

template <class Kernel>
void write_kernels(JsonList& list, const char* kind, std::span<const Kernel> kernels) {
  for (const Kernel& kernel : kernels) {
    const auto& variant = kernel.variant;
    if (!is_listed(variant)) continue;
    list.next() << "{\"kind\": \"" << kind << "\", \"arch\": " << static_cast<int>(variant.arch) << ", \"dtype\": \""
                << name_of(variant.dtype) << "\", \"tile_row\": [" << variant.head_dim.qk << ", " << variant.head_dim.v
                << ", " << bytes_of(variant.smem) << "]}";
  }
}

}  // namespace

std::string built_kernels() {
  std::ostringstream json;
  json << "{\"tile_rows\": {\"forward\": {\"80\": ";
  write_tile_rows(json, kForwardTilesSm80);
  json << ", \"90\": ";
  write_tile_rows(json, kForwardTilesSm90);
  json << "}, \"backward\": {\"80\": ";
  write_tile_rows(json, kBackwardTilesSm80);
  json << "}}, \"kernels\": ";
  {
    JsonList list(json);
    write_kernels(list, "forward", built_forward_kernels());
    write_kernels(list, "backward", built_backward_kernels());
  }
  json << "}";
  return json.str();
}

}  // namespace flash_attn
