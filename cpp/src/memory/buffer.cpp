#include "fastbptt/buffer.h"

#include <cstdio>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastbptt {
namespace {

// Below this the question costs more than it can save.
constexpr std::size_t ask_from = std::size_t(256) << 20;

// A large tape is written once from end to end, so most of its cost is the pages' first touch: huge
// ones, where the system has them, take fewer faults for it.
constexpr std::size_t huge_page = std::size_t(2) << 20;
constexpr std::size_t huge_from = 2 * huge_page;

// What Linux thinks it can still give without swapping; no limit where that is not known.
std::size_t available_memory() {
  std::size_t available = static_cast<std::size_t>(-1);
#ifdef __linux__
  if (std::FILE* file = std::fopen("/proc/meminfo", "r")) {
    char line[128];
    unsigned long long kib = 0;
    while (std::fgets(line, sizeof line, file)) {
      if (std::sscanf(line, "MemAvailable: %llu kB", &kib) == 1) {
        available = static_cast<std::size_t>(kib) * 1024;
        break;
      }
    }
    std::fclose(file);
  }
#endif
  return available;
}

}  // namespace

void* allocate_aligned(std::size_t bytes) {
  const std::size_t alignment = bytes >= huge_from ? huge_page : 64;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  if (bytes >= ask_from && bytes > available_memory()) throw std::bad_alloc();
  void* data = std::aligned_alloc(alignment, bytes);
  if (!data) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == huge_page) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace fastbptt
