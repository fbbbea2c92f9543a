// Linear layers and losses over rows, and the gradient of an embedding. All arrays are contiguous.
// Sums over rows go on from what is in the gradient, from the last row to the first, so that where
// rows are cut does not change a bit. After an Interrupted nothing was added.
#pragma once
#include <cstdint>

#include "fastbptt/recurrent.h"

namespace fastbptt {

// y = x W^T + b: x [rows, K], y [rows, N], weight [N, K], bias [N] or null.
template <class S>
struct Linear {
  Index rows;
  Index K;
  Index N;
  const S* x;
  const S* weight;
  const S* bias;
};

// Very few rows take the weights as they are, in another order of sums, unless `cuts` says that
// they may be a part of more, whose bits must not depend on the cut.
template <class S>
void linear(const Linear<S>& layer, S* y, bool cuts, Interrupt interrupt = {});

// grad_y [rows, N]; grad_x [rows, K], written; the others added to, grad_bias may be null.
template <class S>
void linear_backward(const Linear<S>& layer, const S* grad_y, S* grad_x, S* grad_weight,
                     S* grad_bias, Interrupt interrupt = {});

// A readout and its loss, a block of rows at a time, so that the logits never exist as a whole.
// Without a weight x is the prediction itself, and N == K.
template <class S>
struct ReadoutLoss {
  Linear<S> readout;
  Loss loss;
  const std::int64_t* classes;  // cross_entropy: [rows]
  std::int64_t ignore_index;    // a class that does not count
  const S* values;              // mse: [rows, N]
  const bool* counts;           // mse: [rows], whether a row counts; null: all do
  double scale;
  S* grad_x;       // [rows, K], written; null for the loss alone
  S* grad_weight;  // [N, K], added to
  S* grad_bias;    // [N], added to; may be null
};

// scale * the sum over what counts.
template <class S>
double readout_loss(const ReadoutLoss<S>& job, Interrupt interrupt = {});

// Bytes that a readout_loss with gradient takes for itself, at most.
template <class S>
Index readout_nbytes(Index K, Index N, Index rows);

// grad_weight[index[r], :] += grad[r, :] for every row r, from the last to the first; both are [.,
// E].
template <class S>
void embedding_backward(Index rows, Index E, const std::int64_t* index, const S* grad,
                        S* grad_weight);

}  // namespace fastbptt
