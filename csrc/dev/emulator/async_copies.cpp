#include "dev/emulator/async_copies.h"

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "dev/emulator/memory_check.h"
#include "dev/emulator/thread_block.h"

namespace flash_attn::emulator {
namespace {

struct Copy {
  void* smem;
  const void* from;
  bool reads;
};

struct Copies {
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

std::map<int, Copies> copies_of_threads;

Copies& own_copies() { return copies_of_threads[running_thread]; }

}  // namespace

void drop_async_copies() { copies_of_threads.clear(); }

void start_async_copy(void* smem, const void* from, bool reads) {
  const auto addresses = reinterpret_cast<uintptr_t>(smem) | (reads ? reinterpret_cast<uintptr_t>(from) : 0);
  if (addresses % kAsyncCopyBytes != 0) fail("cp.async at an address that is no multiple of its size");
  if (reads) memory::read(from, kAsyncCopyBytes);
  memory::expect(smem, kAsyncCopyBytes);
  own_copies().uncommitted.push_back({smem, from, reads});
}

void commit_async_copies() {
  Copies& copies = own_copies();
  copies.groups.push_back(std::move(copies.uncommitted));
  copies.uncommitted.clear();
}

void wait_for_async_copies(int num_groups_left) {
  std::deque<std::vector<Copy>>& groups = own_copies().groups;
  for (; static_cast<int>(groups.size()) > num_groups_left; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      memory::write(copy.smem, kAsyncCopyBytes);
      if (copy.reads) {
        std::memcpy(copy.smem, copy.from, kAsyncCopyBytes);
      } else {
        std::memset(copy.smem, 0, kAsyncCopyBytes);
      }
    }
  }
}

void wait_for_all_async_copies() {
  commit_async_copies();
  wait_for_async_copies(0);
}

}  // namespace flash_attn::emulator
