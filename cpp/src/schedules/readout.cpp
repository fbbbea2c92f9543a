// Linear layers and losses, a block of rows at a time.
#include "fastbptt/readout.h"

#include <algorithm>
#include <vector>

#include "dispatch/dispatch.h"
#include "fastbptt/buffer.h"
#include "fastbptt/runtime.h"
#include "schedules/stop_flag.h"
#include "threads/pool.h"

namespace fastbptt {
namespace {

// A block's logits stay in the cache between the product, the loss and the products back.
constexpr Index block_rows = 128;

// Consecutive blocks of rows, shared out to threads. Which rows a part has depends on the number of
// threads alone, so the same call gives the same bits.
struct Split {
  Index rows;
  int parts;
  Index begin(int p) const {
    const Index blocks = (rows + block_rows - 1) / block_rows;
    return std::min(rows, blocks * p / parts * block_rows);
  }
};

Split split_rows(Index rows, double flops) {
  const double blocks = std::max<double>(1, (rows + block_rows - 1) / block_rows);
  const double worth = std::max(1.0, flops / flops_a_thread);
  return {rows, static_cast<int>(std::min({worth, blocks, double(get_num_threads())}))};
}

template <class S>
RowsJob<S> rows_of(const Linear<S>& layer, Index row, Index n) {
  return {n, layer.K, layer.N, layer.x + row * layer.K, layer.weight, layer.bias};
}

// Calls body(part, row, n) for every block; parts run beside each other.
template <class F>
void for_blocks(const Split& split, StopFlag& stop, F&& body) {
  run_parts(split.parts, [&](int p) {
    const Index end = split.begin(p + 1);
    for (Index row = split.begin(p); row < end && !stop.asked(); row += block_rows) {
      body(p, row, std::min(block_rows, end - row));
    }
  });
  stop.raise();
}

// Weight gradients of a linear layer, one set a part, added up in order at the end. The first part
// adds to the result itself.
template <class S>
class PartGrads {
 public:
  PartGrads(int parts, Index weight, Index bias, S* grad_weight, S* grad_bias)
      : weight_(weight),
        bias_(grad_bias ? bias : 0),
        parts_(parts),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        rest_(grad_weight ? (parts - 1) * (weight_ + bias_) : 0) {
    std::fill(rest_.data(), rest_.data() + rest_.size(), S(0));
  }
  S* weight(int p) const { return p == 0 ? grad_weight_ : at(p); }
  S* bias(int p) const {
    if (!grad_bias_) return nullptr;
    return p == 0 ? grad_bias_ : at(p) + weight_;
  }
  void add_up() const {
    if (!grad_weight_) return;
    for (int p = 1; p < parts_; ++p) {
      for (Index i = 0; i < weight_; ++i) grad_weight_[i] += at(p)[i];
      for (Index i = 0; i < bias_; ++i) grad_bias_[i] += at(p)[weight_ + i];
    }
  }

 private:
  S* at(int p) const { return rest_.data() + (p - 1) * (weight_ + bias_); }
  Index weight_;
  Index bias_;
  int parts_;
  S* grad_weight_;
  S* grad_bias_;
  Buffer<S> rest_;
};

// Overwrites prediction by the gradient of scale * sum of squares; returns the sum, not scaled.
template <class S>
double squared_error(Index n, S* prediction, const S* target, double scale) {
  double sum = 0;
  for (Index i = 0; i < n; ++i) {
    const S difference = prediction[i] - target[i];
    sum += double(difference) * double(difference);
    prediction[i] = S(2 * scale) * difference;
  }
  return sum;
}

}  // namespace

template <class S>
void linear(const Linear<S>& layer, S* y, Interrupt interrupt) {
  StopFlag stop(interrupt);
  const Split split = split_rows(layer.rows, 2.0 * layer.rows * layer.K * layer.N);
  for_blocks(split, stop, [&](int, Index row, Index n) {
    kernels().rows<S>().linear(rows_of(layer, row, n), y + row * layer.N);
  });
}

template <class S>
void linear_backward(const Linear<S>& layer, const S* grad_y, S* grad_x, S* grad_weight,
                     S* grad_bias, Interrupt interrupt) {
  StopFlag stop(interrupt);
  const Split split = split_rows(layer.rows, 4.0 * layer.rows * layer.K * layer.N);
  const PartGrads<S> grads(split.parts, layer.N * layer.K, layer.N, grad_weight, grad_bias);
  for_blocks(split, stop, [&](int p, Index row, Index n) {
    kernels().rows<S>().linear_backward(rows_of(layer, row, n), grad_y + row * layer.N,
                                        grad_x + row * layer.K, grads.weight(p), grads.bias(p));
  });
  grads.add_up();
}

template <class S>
double readout_loss(const ReadoutLoss<S>& job, Interrupt interrupt) {
  const Linear<S>& readout = job.readout;
  const RowsKernels<S>& kernel = kernels().rows<S>();
  const Index K = readout.K, N = readout.N;
  const Split split =
      split_rows(readout.rows, (readout.weight ? 6.0 * K : 20.0) * readout.rows * N);
  const Index part_size = block_rows * N;
  const Buffer<S> predictions(split.parts * part_size);
  const PartGrads<S> grads(split.parts, N * K, N, job.grad_weight, job.grad_bias);
  std::vector<double> sums(split.parts, 0.0);
  StopFlag stop(interrupt);
  for_blocks(split, stop, [&](int p, Index row, Index n) {
    S* prediction = predictions.data() + p * part_size;
    const RowsJob<S> rows = rows_of(readout, row, n);
    if (readout.weight)
      kernel.linear(rows, prediction);
    else
      std::copy(rows.x, rows.x + n * K, prediction);
    sums[p] +=
        job.loss == Loss::cross_entropy
            ? kernel.cross_entropy(n, N, prediction, job.classes + row, job.ignore_index, job.scale)
            : squared_error(n * N, prediction, job.values + row * N, job.scale);
    if (!job.grad_x) return;
    S* grad_x = job.grad_x + row * K;
    if (readout.weight) {
      kernel.linear_backward(rows, prediction, grad_x, grads.weight(p), grads.bias(p));
    } else {
      std::copy(prediction, prediction + n * K, grad_x);
    }
  });
  grads.add_up();
  double sum = 0;
  for (double part : sums) sum += part;
  return sum * job.scale;
}

template <class S>
void embedding_backward(Index rows, Index E, const std::int64_t* index, const S* grad,
                        S* grad_weight) {
  for (Index r = 0; r < rows; ++r) {
    S* row = grad_weight + index[r] * E;
    for (Index e = 0; e < E; ++e) row[e] += grad[r * E + e];
  }
}

#define FASTBPTT_INSTANTIATE(S)                                                        \
  template void linear<S>(const Linear<S>&, S*, Interrupt);                            \
  template void linear_backward<S>(const Linear<S>&, const S*, S*, S*, S*, Interrupt); \
  template double readout_loss<S>(const ReadoutLoss<S>&, Interrupt);                   \
  template void embedding_backward<S>(Index, Index, const std::int64_t*, const S*, S*);
FASTBPTT_INSTANTIATE(float)
FASTBPTT_INSTANTIATE(double)

}  // namespace fastbptt
