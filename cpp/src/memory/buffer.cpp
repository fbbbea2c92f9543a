#include "fastbptt/buffer.h"

#include <cstdio>

namespace fastbptt {
namespace {

// Below this the question costs more than it can save.
constexpr std::size_t ask_from = std::size_t(256) << 20;

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
  constexpr std::size_t line = 64;
  bytes = (bytes + line - 1) / line * line;
  if (bytes >= ask_from && bytes > available_memory()) throw std::bad_alloc();
  void* data = std::aligned_alloc(line, bytes);
  if (!data) throw std::bad_alloc();
  return data;
}

}  // namespace fastbptt
