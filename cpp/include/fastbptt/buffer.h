// Memory for scratch and for results: aligned, not initialised, freed with its owner.
#pragma once
#include <cstddef>
#include <new>

#include "fastbptt/types.h"

namespace fastbptt {

// Throws std::bad_alloc when the machine plainly cannot give that much, rather than let an
// overcommitting kernel kill the process when the pages are touched.
void* allocate_aligned(std::size_t bytes);

// Blocks of this size and more are kept for the next step when they are freed. It is where malloc
// begins to give each block back to the system at once, or now and then, as its heap happens to
// lie.
constexpr std::size_t kept_block = std::size_t(128) << 10;

// Takes back what allocate_aligned(bytes) gave; null is nothing.
void free_aligned(void* data, std::size_t bytes) noexcept;

// Bytes in buffers now, and the most there were since the last reset.
struct Allocated {
  std::size_t now;
  std::size_t most;
};
Allocated allocated(bool reset);

template <class S>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(Index size)
      : data_(size > 0
                  ? static_cast<S*>(allocate_aligned(static_cast<std::size_t>(size) * sizeof(S)))
                  : nullptr),
        size_(size) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      release();
      data_ = other.data_;
      size_ = other.size_;
      other.data_ = nullptr;
      other.size_ = 0;
    }
    return *this;
  }
  ~Buffer() { release(); }
  S* data() const { return data_; }
  Index size() const { return size_; }

 private:
  void release() { free_aligned(data_, static_cast<std::size_t>(size_) * sizeof(S)); }

  S* data_ = nullptr;
  Index size_ = 0;
};

}  // namespace fastbptt
