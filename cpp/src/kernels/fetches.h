// What comes behind a product reads rows that lie so far from each other that the processor does
// not see which is next. They are fetched while the product runs, one row at a time: all at once
// would fill the buffers in which the first cache waits for memory, and the product's own loads
// would wait behind them.
#pragma once
#include <cstdint>

#include "kernels/kernel_table.h"
#include "kernels/packet.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

struct RowFetch {
  static constexpr int line = 64;
  const char* from;
  Index row, lines, step;  // bytes from row to row, lines of each, bytes between them
  const Index* places;     // which row each is; null: as they come

  FASTBPTT_INLINE void fetch(Index r) const {
    const char* at = from + (places ? places[r] : r) * row;
    for (Index n = 0; n < lines; ++n, at += step) __builtin_prefetch(at);
  }
};

// n values of each row.
template <class T>
FASTBPTT_INLINE RowFetch values_of(const T* from, Index row, Index n) {
  constexpr Index size = Index(sizeof(T)), line = RowFetch::line;
  const bool even = reinterpret_cast<std::uintptr_t>(from) % line == 0 && row * size % line == 0;
  const auto at = reinterpret_cast<const char*>(from);
  return {at, row * size, ceil_div(n * size, line) + (even ? 0 : 1), line, nullptr};
}

// n values from `first` on of the rows from b on.
template <class T>
FASTBPTT_INLINE RowFetch values_of(const PlacedSequence<T>& all, Index t, Index b, Index first,
                                   Index n) {
  RowFetch rows = values_of(all.data + t * all.step + first, all.row, n);
  if (all.places) {
    rows.places = all.places + b;
  } else {
    rows.from += b * rows.row;
  }
  return rows;
}

class RowFetches {
 public:
  RowFetches() {}  // leaves them as they are: there is no time to clear them
  FASTBPTT_INLINE void add(const RowFetch& one) { fetches_[count_++] = one; }
  FASTBPTT_INLINE void fetch(Index row) const {
    for (int i = 0; i < count_; ++i) fetches_[i].fetch(row);
  }
  FASTBPTT_INLINE void fetch(Index begin, Index end) const {
    for (; begin < end; ++begin) fetch(begin);
  }

 private:
  int count_ = 0;
  RowFetch fetches_[4];  // dL/dy, y, the tape, wide or narrow, and c before
};

// A single row, at once.
struct FetchNow {
  FASTBPTT_INLINE void add(const RowFetch& one) const { one.fetch(0); }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
