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

// Values of dL/dy that exist at a time, and the rows that they are cut into for the cache.
constexpr Index block_values = Index(1) << 16;
constexpr Index fewest_rows = 128, most_rows = 1024;
constexpr Index slice_rows = 64;

// Rows up to which packing the weights costs more than it saves.
constexpr Index direct_rows = 4;

// A readout over rows, block by block from the last to the first: the rows of a block are shared
// out to the threads, then the weight gradient. So neither the number of threads nor where the rows
// were cut changes a bit of any gradient. What was in the gradients is the start of the sums.
template <class S>
class Blocks {
 public:
  // `flops`: of each value of a row. A product computes whole packets.
  Blocks(const Linear<S>& layer, double flops, bool gradient)
      : layer_(layer), block_(block_of(layer.rows, layer.N)) {
    const Index K = layer.K, N = layer.N;
    const Index computed = layer.weight ? std::min(step(), kernel_.sums(N, 1)) : N;
    const double worth = flops * layer.rows * computed / flops_a_thread;
    parts_ = static_cast<int>(
        std::min({std::max(1.0, worth), double(get_num_threads()), double(block_)}));
    values_ = Buffer<S>(parts_ * slice_rows * step());
    if (!layer.weight) return;
    sums_ = Buffer<S>(kernel_.sums(N, block_));
    packed_ = Buffer<S>(kernel_.packed(K, N));
    kernel_.pack(K, N, layer.weight, layer.bias, packed_.data());
    if (!gradient) return;
    scratch_ = Buffer<S>(parts_ * scratch_size());
    columns_ = Buffer<S>(kernel_.columns(K, N));
    kernel_.pack_columns(K, N, layer.weight, columns_.data());
  }

  int parts() const { return parts_; }
  // From one row of a slice's values to the next: each begins a cache line.
  Index step() const { return row_step(layer_.N); }
  static Index row_step(Index N) {
    constexpr Index line = 64 / Index(sizeof(S));
    return (N + line - 1) / line * line;
  }
  static Index block_of(Index rows, Index N) {
    const Index fitting = block_values / kernels().rows<S>().sums(N, 1);
    return std::min(rows, std::clamp(fitting, fewest_rows, most_rows));
  }
  static Index scratch_size() { return slice_rows * 4 * kernels().rows<S>().lanes; }

  // Calls slice(part, first row of all, row in the block, rows, room for their values [rows, N]),
  // and after all slices of a block gradient(part, first row of all, rows). One team does all
  // blocks: to wake a thread takes as long as its share of one, where rows have few values.
  template <class F, class G>
  void run(StopFlag& stop, F&& slice, G&& gradient) const {
    Barrier barrier;
    bool ended = false;  // written by one member while the others are between the barriers
    run_team(parts_, [&](int rank, int size) {
      for (Index end = layer_.rows; end > 0;) {
        const Index begin = std::max<Index>(0, end - block_);
        const Index n = end - begin;
        for (int p = rank; p < parts_; p += size) {
          const Index last = n * (p + 1) / parts_;
          for (Index row = n * p / parts_; row < last && !stop.asked(); row += slice_rows) {
            slice(p, begin + row, row, std::min(slice_rows, last - row),
                  values_.data() + p * slice_rows * step());
          }
        }
        barrier.wait(size);
        for (int p = rank; p < parts_; p += size) gradient(p, begin, n);
        if (rank == 0) ended = stop.is_set();
        barrier.wait(size);
        if (ended) return;
        end = begin;
      }
    });
    stop.raise();
  }

  void multiply(Index first, Index row, Index n) const {
    kernel_.multiply(layer_.K, layer_.N, row, n, block_, layer_.x + first * layer_.K,
                     packed_.data(), sums_.data());
  }
  void read(Index row, Index n, S* y, Index step) const {
    kernel_.read(layer_.N, row, n, block_, sums_.data(), y, step);
  }
  void write(Index row, Index n, const S* y, Index step) const {
    kernel_.write(layer_.N, row, n, block_, y, step, sums_.data());
  }
  void grad_x(int part, Index row, Index n, S* to) const {
    kernel_.grad_x(layer_.K, layer_.N, row, n, block_, sums_.data(), columns_.data(),
                   scratch_.data() + part * scratch_size(), to);
  }

  // The gradient so far, in panels.
  Buffer<S> gradient(const S* weight, const S* bias) const {
    Buffer<S> panels(kernel_.packed(layer_.K, layer_.N));
    kernel_.pack(layer_.K, layer_.N, weight, bias, panels.data());
    return panels;
  }
  void add_gradient(int part, Index begin, Index n, S* panels) const {
    // Shared out are panels, or columns of all panels where these are too few.
    const Index J = kernel_.panels(layer_.N), K = layer_.K;
    const Index all = J < parts_ ? K : J;
    Index panel[] = {0, J}, column[] = {0, K};
    Index* const shared = J < parts_ ? column : panel;
    shared[0] = all * part / parts_, shared[1] = all * (part + 1) / parts_;
    // With fewer columns than parts some have none, and only one may add the bias.
    if (shared[0] == shared[1]) return;
    kernel_.add_gradient(K, layer_.N, n, block_, layer_.x + begin * K, sums_.data(), panel[0],
                         panel[1], column[0], column[1], panels);
  }
  void unpack(const Buffer<S>& panels, S* weight, S* bias) const {
    kernel_.unpack(layer_.K, layer_.N, panels.data(), weight, bias);
  }

 private:
  const Linear<S>& layer_;
  const RowsKernels<S>& kernel_ = kernels().rows<S>();
  const Index block_;
  int parts_;
  Buffer<S> sums_, values_, scratch_, packed_, columns_;
};

// Overwrites rows of predictions by the gradient of scale * sum of squares, over the rows that
// count; returns the sum, not scaled.
template <class S>
double squared_error(Index n, Index N, S* prediction, Index step, const S* target,
                     const bool* counts, double scale) {
  double sum = 0;
  for (Index r = 0; r < n; ++r, prediction += step, target += N) {
    if (counts && !counts[r]) {
      std::fill_n(prediction, N, S(0));
      continue;
    }
    const auto take = [&](Index i) {
      const S difference = prediction[i] - target[i];
      prediction[i] = S(2 * scale) * difference;
      return double(difference) * double(difference);
    };
    // Several sums beside each other: one alone would wait for each addition.
    constexpr Index together = 8;
    double parts[together] = {};
    const Index even = N / together * together;
    for (Index i = 0; i < even; i += together) {
      for (Index k = 0; k < together; ++k) parts[k] += take(i + k);
    }
    for (Index k = 0; k < together && even > 0; ++k) sum += parts[k];
    for (Index i = even; i < N; ++i) sum += take(i);
  }
  return sum;
}

}  // namespace

template <class S>
void linear(const Linear<S>& layer, S* y, bool cuts, Interrupt interrupt) {
  if (layer.rows <= direct_rows && !cuts) {
    return kernels().rows<S>().multiply_directly(layer.K, layer.N, layer.rows, layer.x,
                                                 layer.weight, layer.bias, y);
  }
  StopFlag stop(interrupt);
  const Blocks<S> blocks(layer, 2.0 * layer.K, false);
  blocks.run(
      stop,
      [&](int, Index first, Index row, Index n, S*) {
        blocks.multiply(first, row, n);
        blocks.read(row, n, y + first * layer.N, layer.N);
      },
      [](int, Index, Index) {});
}

template <class S>
void linear_backward(const Linear<S>& layer, const S* grad_y, S* grad_x, S* grad_weight,
                     S* grad_bias, Interrupt interrupt) {
  StopFlag stop(interrupt);
  const Blocks<S> blocks(layer, 4.0 * layer.K, true);
  const Buffer<S> gradient = blocks.gradient(grad_weight, grad_bias);
  blocks.run(
      stop,
      [&](int p, Index first, Index row, Index n, S*) {
        blocks.write(row, n, grad_y + first * layer.N, layer.N);
        blocks.grad_x(p, row, n, grad_x + first * layer.K);
      },
      [&](int p, Index begin, Index n) { blocks.add_gradient(p, begin, n, gradient.data()); });
  blocks.unpack(gradient, grad_weight, grad_bias);
}

template <class S>
double readout_loss(const ReadoutLoss<S>& job, Interrupt interrupt) {
  const Linear<S>& readout = job.readout;
  const Index K = readout.K, N = readout.N;
  const Blocks<S> blocks(readout, readout.weight ? 6.0 * K : 20.0, job.grad_x != nullptr);
  const Index step = blocks.step();
  const bool weights = readout.weight && job.grad_x;
  const Buffer<S> gradient =
      weights ? blocks.gradient(job.grad_weight, job.grad_bias) : Buffer<S>();
  std::vector<double> sums(blocks.parts(), 0.0);
  StopFlag stop(interrupt);
  blocks.run(
      stop,
      [&](int p, Index first, Index row, Index n, S* values) {
        if (readout.weight) {
          blocks.multiply(first, row, n);
          blocks.read(row, n, values, step);
        } else {
          for (Index r = 0; r < n; ++r) {
            std::copy_n(readout.x + (first + r) * K, K, values + r * step);
          }
        }
        sums[p] += job.loss == Loss::cross_entropy
                       ? kernels().rows<S>().cross_entropy(n, N, values, step, job.classes + first,
                                                           job.ignore_index, job.scale)
                       : squared_error(n, N, values, step, job.values + first * N,
                                       job.counts ? job.counts + first : nullptr, job.scale);
        if (!job.grad_x) return;
        if (!readout.weight) {
          for (Index r = 0; r < n; ++r) {
            std::copy_n(values + r * step, K, job.grad_x + (first + r) * K);
          }
          return;
        }
        blocks.write(row, n, values, step);
        blocks.grad_x(p, row, n, job.grad_x + first * K);
      },
      [&](int p, Index begin, Index n) {
        if (weights) blocks.add_gradient(p, begin, n, gradient.data());
      });
  if (weights) blocks.unpack(gradient, job.grad_weight, job.grad_bias);
  double sum = 0;
  for (double part : sums) sum += part;
  return sum * job.scale;
}

template <class S>
Index readout_nbytes(Index K, Index N, Index rows) {
  const RowsKernels<S>& kernel = kernels().rows<S>();
  const Index parts = get_num_threads();
  return Index(sizeof(S)) *
         (parts * (slice_rows * Blocks<S>::row_step(N) + Blocks<S>::scratch_size()) +
          kernel.sums(N, Blocks<S>::block_of(rows, N)) + 2 * kernel.packed(K, N) +
          kernel.columns(K, N));
}

template <class S>
void embedding_backward(Index rows, Index E, const std::int64_t* index, const S* grad,
                        S* grad_weight) {
  for (Index r = rows - 1; r >= 0; --r) {
    S* row = grad_weight + index[r] * E;
    for (Index e = 0; e < E; ++e) row[e] += grad[r * E + e];
  }
}

#define FASTBPTT_INSTANTIATE(S)                                                        \
  template void linear<S>(const Linear<S>&, S*, bool, Interrupt);                      \
  template void linear_backward<S>(const Linear<S>&, const S*, S*, S*, S*, Interrupt); \
  template double readout_loss<S>(const ReadoutLoss<S>&, Interrupt);                   \
  template Index readout_nbytes<S>(Index, Index, Index);                               \
  template void embedding_backward<S>(Index, Index, const std::int64_t*, const S*, S*);
FASTBPTT_INSTANTIATE(float)
FASTBPTT_INSTANTIATE(double)

}  // namespace fastbptt
