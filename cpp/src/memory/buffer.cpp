#include "fastbptt/buffer.h"

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>
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

std::size_t alignment_of(std::size_t bytes) { return bytes >= huge_from ? huge_page : 64; }

// Large blocks end where a page does, of whatever size: the system is told about whole pages.
std::size_t rounded(std::size_t bytes) {
  const std::size_t unit = bytes >= huge_from ? large_block_unit : 64;
  return (bytes + unit - 1) / unit * unit;
}

void* from_system(std::size_t bytes) {
  if (bytes >= ask_from && bytes > available_memory()) throw std::bad_alloc();
  const std::size_t alignment = alignment_of(bytes);
  void* data = nullptr;
  if (posix_memalign(&data, alignment, bytes) != 0) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == huge_page) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

#if defined(MADV_FREE) && !defined(__SANITIZE_ADDRESS__)
// Large blocks that were freed, for the next training step, which wants the same again: to get them
// from the system each time costs a tenth of a step, and half of one where it has to move other
// pages to make huge ones. While they lie here the system may take their pages (MADV_FREE).
class FreeBlocks {
 public:
  // A block of exactly this size, or null.
  void* take(std::size_t bytes) noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (Block& block : blocks_) {
      if (block.bytes == bytes) return std::exchange(block, Block{}).data;
    }
    return nullptr;
  }
  // Keeps it, and frees the one that has been here longest.
  void put(void* data, std::size_t bytes) noexcept {
    madvise(data, bytes, MADV_FREE);
    {
      // Never waits: after a fork another thread's lock may stay locked for good.
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock) {
        data = std::exchange(blocks_[oldest_], Block{data, bytes}).data;
        oldest_ = (oldest_ + 1) % blocks_.size();
      }
    }
    std::free(data);
  }

 private:
  struct Block {
    void* data = nullptr;
    std::size_t bytes = 0;
  };
  std::mutex mutex_;
  std::array<Block, 4> blocks_;  // a step's tape, and the packed weights forward and back
  std::size_t oldest_ = 0;
};

FreeBlocks& free_blocks() {
  static FreeBlocks* const blocks = new FreeBlocks;  // outlives every static that frees a buffer
  return *blocks;
}
#else
struct FreeBlocks {
  void* take(std::size_t) noexcept { return nullptr; }
  void put(void* data, std::size_t) noexcept { std::free(data); }
};
FreeBlocks free_blocks() { return {}; }
#endif

std::atomic<std::size_t> live{0};
std::atomic<std::size_t> most_live{0};

void count(std::size_t bytes) {
  const std::size_t now = live.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  std::size_t most = most_live.load(std::memory_order_relaxed);
  while (now > most && !most_live.compare_exchange_weak(most, now, std::memory_order_relaxed)) {
  }
}

}  // namespace

void* allocate_aligned(std::size_t bytes) {
  bytes = rounded(bytes);
  void* data = bytes >= huge_from ? free_blocks().take(bytes) : nullptr;
  if (!data) data = from_system(bytes);
  count(bytes);
  return data;
}

void free_aligned(void* data, std::size_t bytes) noexcept {
  if (!data) return;
  bytes = rounded(bytes);
  live.fetch_sub(bytes, std::memory_order_relaxed);
  if (bytes >= huge_from) return free_blocks().put(data, bytes);
  std::free(data);
}

Allocated allocated(bool reset) {
  const Allocated result{live.load(), most_live.load()};
  if (reset) most_live = result.now;
  return result;
}

}  // namespace fastbptt
