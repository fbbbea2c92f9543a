#include "fastbptt/buffer.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>
#ifdef __linux__
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace fastbptt {
namespace {

// Below this the question costs more than it can save.
constexpr std::size_t ask_from = std::size_t(256) << 20;

// A large tape is written once from end to end, so most of its cost is the pages' first touch: huge
// ones, where the system has them, take fewer faults for it.
constexpr std::size_t huge_page = std::size_t(2) << 20;
constexpr std::size_t large_block = 2 * huge_page;
constexpr std::size_t large_block_unit = std::size_t(64) << 10;
constexpr std::size_t spare = std::size_t(1) << 20;  // for small blocks beyond what was in use
constexpr std::size_t slack = 4;  // the memory of a forward serves the reverse behind it as well
constexpr std::size_t line = 64;

bool is_small(std::size_t bytes) { return bytes >= kept_block && bytes < large_block; }

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

std::size_t alignment_of(std::size_t bytes) { return bytes >= large_block ? huge_page : line; }

// Large blocks end where a page does, of whatever size: the system is told about whole pages.
std::size_t rounded(std::size_t bytes) {
  const std::size_t unit = bytes >= large_block ? large_block_unit : line;
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

std::atomic<std::size_t> live{0};
std::atomic<std::size_t> most_live{0};  // since the last reset
std::atomic<std::size_t> most_ever{0};
std::atomic<std::size_t> small_live{0};  // of them, in small blocks that will be kept
std::atomic<std::size_t> small_held{0};  // and what these blocks really have
std::atomic<std::size_t> most_small{0};

void raise(std::atomic<std::size_t>& most, std::size_t now) {
  std::size_t before = most.load(std::memory_order_relaxed);
  while (now > before && !most.compare_exchange_weak(before, now, std::memory_order_relaxed)) {
  }
}

// Bytes that were asked for, and those of the block.
void count(std::size_t bytes, std::size_t block) {
  const std::size_t now = live.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  raise(most_live, now);
  raise(most_ever, now);
  if (!is_small(bytes)) return;
  small_held.fetch_add(block, std::memory_order_relaxed);
  raise(most_small, small_live.fetch_add(bytes, std::memory_order_relaxed) + bytes);
}

void uncount(std::size_t bytes, std::size_t block) {
  live.fetch_sub(bytes, std::memory_order_relaxed);
  if (!is_small(bytes)) return;
  small_held.fetch_sub(block, std::memory_order_relaxed);
  small_live.fetch_sub(bytes, std::memory_order_relaxed);
}

#if defined(MADV_FREE) && !defined(__SANITIZE_ADDRESS__)
// What small blocks may come to, those that lie free with those in use.
std::size_t small_limit() { return most_small.load(std::memory_order_relaxed) + spare; }

// What a large block has, of which so much was asked for.
#ifdef __linux__
constexpr bool knows_sizes = true;
std::size_t large_size(void* data, std::size_t) {
  return malloc_usable_size(data) / large_block_unit * large_block_unit;
}
#else
constexpr bool knows_sizes = false;
std::size_t large_size(void*, std::size_t bytes) { return bytes; }
#endif

// Large blocks that were freed, for the next training step, which wants the same again: to get them
// from the system each time costs a tenth of a step, and half of one where it has to move other
// pages to make huge ones. While large ones lie here the system may take their pages (MADV_FREE).
// What lies here and what is in use never come to more than one and a half times what was in use at
// once, and small blocks not to much more than was asked for of them at once.
class FreeBlocks {
 public:
  // Bytes in front of what the caller gets, where a small block keeps its size.
  static std::size_t front(std::size_t bytes) {
    return is_small(bytes) && is_small(bytes + line) ? line : 0;
  }

  // A block of this size, or null; or a small one of up to `slack` times as much, whose size
  // `bytes` then is, as long as such blocks in use stay within what they may come to; or a large
  // one of up to twice as much: what a forward and the reverse behind it take in turn is one
  // block then, where both would be too much.
  void* take(std::size_t& bytes) noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const bool large = bytes >= large_block;
    const std::size_t most = large ? most_for(bytes) : std::min(slack * bytes, large_block - 1);
    Block* best = nullptr;
    for (Block& block : blocks_) {
      if (!block.data || block.bytes < bytes || block.bytes > most) continue;
      if (!best || block.bytes < best->bytes) best = &block;
    }
    if (!best) return nullptr;
    if (large) return remove(*best);
    const std::size_t held = small_held.load(std::memory_order_relaxed);
    if (best->bytes > bytes && held + best->bytes > small_limit()) return nullptr;
    bytes = best->bytes;
    return remove(*best);
  }
  void put(void* data, std::size_t bytes) noexcept {
    // Never waits: after a fork another thread's lock may stay locked for good.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return std::free(data);
    if (bytes >= large_block) bytes = large_size(data, bytes);
    Block* free = nullptr;
    std::size_t small = 0;
    for (Block& block : blocks_) {
      if (!block.data) {
        free = &block;
      } else if (block.bytes < large_block) {
        ++small;
      }
    }
    // Results that were held for a while, and are let go all at once, leave room for a tape.
    if (bytes < large_block && small >= most_small_blocks) free = &victim(large_block);
    if (!free) free = &victim();
    std::free(remove(*free));
    *free = {data, bytes, ++puts_};
    bytes_ += bytes;
    if (bytes < large_block) small_ += bytes;
    shrink();
    // Of small blocks the system would get little, for a call that costs a good part of a step.
    if (free->data == data && bytes >= large_block) madvise(data, bytes, MADV_FREE);
  }
  // Frees some while, with what is in use, there are too many.
  void make_room() noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock) shrink();
  }
  // Frees all; whether there were any.
  bool clear() noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || bytes_ == 0) return false;
    for (Block& block : blocks_) std::free(remove(block));
    return true;
  }

 private:
  struct Block {
    void* data = nullptr;
    std::size_t bytes = 0;
    std::size_t put = 0;
  };

  // What a large block may have that is taken for so many bytes.
  static std::size_t most_for(std::size_t bytes) { return knows_sizes ? 2 * bytes : bytes; }

  void* remove(Block& block) noexcept {
    bytes_ -= block.bytes;
    if (block.bytes < large_block) small_ -= block.bytes;
    return std::exchange(block, Block{}).data;
  }
  // The newest: steps ask for the same blocks in turn, and to give up the oldest would be to give
  // up each just before it is wanted. But first what nobody has asked for in a long time. Of those
  // below `limit`, of which there is one.
  Block& victim(std::size_t limit = static_cast<std::size_t>(-1)) noexcept {
    Block *oldest = nullptr, *newest = nullptr;
    for (Block& block : blocks_) {
      if (!block.data || block.bytes >= limit) continue;
      if (!oldest || block.put < oldest->put) oldest = &block;
      if (!newest || block.put > newest->put) newest = &block;
    }
    return puts_ - oldest->put > 4 * blocks_.size() ? *oldest : *newest;
  }
  // The largest large block in whose place another that lies here could be taken; or null.
  Block* largest_spare() noexcept {
    Block* best = nullptr;
    for (Block& block : blocks_) {
      if (block.bytes < large_block || (best && block.bytes <= best->bytes)) continue;
      for (const Block& other : blocks_) {
        const bool serves = other.bytes >= block.bytes && other.bytes <= most_for(block.bytes);
        if (&other != &block && serves) best = &block;
      }
    }
    return best;
  }
  void shrink() noexcept {
    const std::size_t used = live.load(std::memory_order_relaxed);
    const std::size_t most = most_ever.load(std::memory_order_relaxed);
    const std::size_t held = small_held.load(std::memory_order_relaxed);
    while (small_ > 0 && held + small_ > small_limit()) std::free(remove(victim(large_block)));
    while (bytes_ > 0 && used + bytes_ > most + most / 2) {
      Block* const spare = largest_spare();
      std::free(remove(spare ? *spare : victim()));
    }
  }

  std::mutex mutex_;
  static constexpr std::size_t most_small_blocks = 24;
  std::array<Block, 32> blocks_;  // a step's tape, packed weights, outputs and gradients
  std::size_t puts_ = 0;
  std::size_t bytes_ = 0;
  std::size_t small_ = 0;  // of them, in blocks that are not large
};

FreeBlocks& free_blocks() {
  static FreeBlocks* const blocks = new FreeBlocks;  // outlives every static that frees a buffer
  return *blocks;
}
#else
struct FreeBlocks {
  static std::size_t front(std::size_t) { return 0; }
  void* take(std::size_t&) noexcept { return nullptr; }
  void put(void* data, std::size_t) noexcept { std::free(data); }
  void make_room() noexcept {}
  bool clear() noexcept { return false; }
};
FreeBlocks free_blocks() { return {}; }
#endif

}  // namespace

void* allocate_aligned(std::size_t bytes) {
  bytes = rounded(bytes);
  const std::size_t front = FreeBlocks::front(bytes);
  std::size_t block = bytes + front;
  void* data = bytes >= kept_block ? free_blocks().take(block) : nullptr;
  const bool fresh = !data;
  if (fresh) {
    try {
      data = from_system(block);
    } catch (const std::bad_alloc&) {
      if (!free_blocks().clear()) throw;
      data = from_system(block);
    }
  }
  count(bytes, block);
  if (fresh && bytes >= kept_block) free_blocks().make_room();
  if (front > 0) *static_cast<std::size_t*>(data) = block;
  return static_cast<char*>(data) + front;
}

void free_aligned(void* data, std::size_t bytes) noexcept {
  if (!data) return;
  bytes = rounded(bytes);
  const std::size_t front = FreeBlocks::front(bytes);
  void* const start = static_cast<char*>(data) - front;
  const std::size_t block = front > 0 ? *static_cast<std::size_t*>(start) : bytes;
  uncount(bytes, block);
  if (bytes < kept_block) return std::free(start);
  free_blocks().put(start, block);
}

Allocated allocated(bool reset) {
  const Allocated result{live.load(), most_live.load()};
  if (reset) most_live = result.now;
  return result;
}

}  // namespace fastbptt
