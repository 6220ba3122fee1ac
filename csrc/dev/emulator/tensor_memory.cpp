#include "dev/emulator/tensor_memory.h"

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>

#include "variant/rounding.h"

namespace flash_attn::emulator::tensor_memory {
namespace {

constexpr size_t kArenaBytes = size_t{1} << 40;  // of addresses: only what tensors use becomes memory
constexpr size_t kGapBytes = 64 * 1024;
constexpr size_t kPageBytes = 4096;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type

class Arena {
 public:
  Arena() {
    void* const begin =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) throw std::bad_alloc();
    begin_ = next_ = reinterpret_cast<uintptr_t>(begin);
  }

  void* allocate(size_t num_bytes) {
    const std::lock_guard lock(mutex_);
    const uintptr_t begin = next_ + kGapBytes;
    const uintptr_t end = round_up(begin + num_bytes, kPageBytes);
    if (end > begin_ + kArenaBytes) {
      throw std::runtime_error("the emulator gives no address out twice, and has none left: make fewer calls in a run");
    }
    next_ = end;
    sizes_[begin] = num_bytes;
    return std::memset(reinterpret_cast<void*>(begin), kPoison, num_bytes);
  }

  void free(void* tensor) {
    const std::lock_guard lock(mutex_);
    const auto found = sizes_.find(reinterpret_cast<uintptr_t>(tensor));
    madvise(tensor, found->second, MADV_DONTNEED);
    sizes_.erase(found);
  }

  bool holds(uintptr_t address) const { return address - begin_ < kArenaBytes; }

  bool may_touch(uintptr_t begin, size_t num_bytes) {
    if (!holds(begin)) return true;
    const std::lock_guard lock(mutex_);
    auto found = sizes_.upper_bound(begin);
    if (found == sizes_.begin()) return false;
    --found;
    return begin - found->first + num_bytes <= found->second;
  }

 private:
  std::mutex mutex_;
  uintptr_t begin_;
  uintptr_t next_;
  std::map<uintptr_t, size_t> sizes_;
};

Arena& arena() {
  static Arena* const the_arena = new Arena();  // tensors may outlive every static object
  return *the_arena;
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t num_bytes) override {
    if (num_bytes == 0) return {nullptr, c10::DeviceType::CPU};
    void* const tensor = arena().allocate(num_bytes);
    return {tensor, tensor, &free, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { std::memcpy(to, from, num_bytes); }

 private:
  static void free(void* tensor) {
    if (tensor != nullptr) arena().free(tensor);
  }
};

Allocator allocator;

constexpr uint8_t kAboveTorchsOwn = 255;
const bool is_in_place = (c10::SetCPUAllocator(&allocator, kAboveTorchsOwn), true);

}  // namespace

bool holds(uintptr_t address) { return arena().holds(address); }
bool may_touch(uintptr_t begin, size_t num_bytes) { return arena().may_touch(begin, num_bytes); }

}  // namespace flash_attn::emulator::tensor_memory
