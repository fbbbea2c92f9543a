// Which rows of a batch are there at each step. With the longest row first they are a prefix, and
// between two lengths always the same: a block. A place in that order is called a rank.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "fastbptt/recurrent.h"

namespace fastbptt {

// Steps [t0, t1) with the same rows.
struct Block {
  Index t0;
  Index t1;
  Index rows;
  Index first;   // rows of time x batch before it
  Index before;  // rows of the blocks before it, each counted once
};

// The blocks of a run of steps, and what they add up to.
struct Blocks {
  std::vector<Block> list;
  Index rows = 0;    // of time x batch
  Index starts = 0;  // rows of the blocks, each counted once
};

class Lengths {
 public:
  explicit Lengths(const Batch& batch) : order_(batch.B), given_(batch.lengths) {
    std::iota(order_.begin(), order_.end(), Index(0));
    if (given_) {
      std::stable_sort(order_.begin(), order_.end(),
                       [&](Index a, Index b) { return batch.lengths[a] > batch.lengths[b]; });
    }
    lengths_.assign(batch.B, batch.T);
    for (Index rank = 0; given_ && rank < batch.B; ++rank) {
      lengths_[rank] = batch.lengths[order_[rank]];
    }
  }

  // Whether rows may have different lengths.
  bool given() const { return given_; }
  // The row of the caller's at a rank.
  Index row(Index rank) const { return order_[rank]; }
  Index length(Index rank) const { return lengths_[rank]; }

  Blocks blocks(Index begin, Index end) const {
    Blocks found;
    Index rank = static_cast<Index>(lengths_.size());
    for (Index t = begin; t < end;) {
      while (rank > 0 && lengths_[rank - 1] <= t) --rank;
      if (rank == 0) break;
      const Index stop = std::min(lengths_[rank - 1], end);
      found.list.push_back({t, stop, rank, found.rows, found.starts});
      found.rows += (stop - t) * rank;
      found.starts += rank;
      t = stop;
    }
    return found;
  }

 private:
  std::vector<Index> order_;
  std::vector<Index> lengths_;  // by rank
  bool given_;
};

}  // namespace fastbptt
