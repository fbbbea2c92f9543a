// What is known of each step of each row beside x: whether the row begins anew before it, and
// whether it is there. Kept in the order in which the threads share out the rows.
#pragma once
#include <array>
#include <utility>
#include <vector>

#include "fastbptt/recurrent.h"

namespace fastbptt {

class Marks {
 public:
  Marks(const Batch& batch, Index directions, std::vector<Index> order)
      : begin(batch.begin), rows(std::move(order)) {
    const Index T = batch.T - batch.begin, B = batch.B;
    const auto keep = [&](const bool* given, Index later) {
      Flags flags;
      if (!given) return flags;
      flags.resize(T * B);
      for (Index i = 0; i < B; ++i) {
        const Index length = batch.lengths ? batch.lengths[rows[i]] - begin : T;
        for (Index t = 0; t + later < length; ++t) {
          flags[t * B + i] = given[(t + later) * B + rows[i]];
        }
      }
      return flags;
    };
    flags_[0] = keep(batch.resets, 0);
    flags_[1] = keep(batch.mask, 0);
    // Backward in time the step before a boundary is the one that begins anew.
    if (directions == 2) flags_[2] = keep(batch.resets, 1);
  }

  // Of resets (0) or mask (1) in direction d, [T - begin, B]; data null: not given.
  bool given(Index which) const { return !flags_[which].empty(); }
  Sequence<const bool> of(Index which, Index d) const {
    const Flags& flags = flags_[which == 0 && d == 1 ? 2 : which];
    const Index B = static_cast<Index>(rows.size());
    if (flags.empty()) return {};
    return {reinterpret_cast<const bool*>(flags.data()), B, 1};
  }

  const Index begin;
  const std::vector<Index> rows;  // the caller's, in that order

 private:
  using Flags = std::vector<unsigned char>;
  std::array<Flags, 3> flags_;
};

}  // namespace fastbptt
