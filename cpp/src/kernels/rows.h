// Linear readout and softmax cross entropy over rows, on the register tiles of the recurrent
// layers. Each row's results, and each gradient's sum from the last row to the first, are the same
// however the rows are cut.
#pragma once
#include <cmath>

#include "kernels/direct_product.h"
#include "kernels/few_outputs.h"
#include "kernels/micro_kernel.h"
#include "kernels/panels.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
class Rows {
  static constexpr Index p = lanes<S>;
  static constexpr Index width = 4 * p;
  using P = Panels<S, ProductPanel>;

 public:
  Rows(Index K, Index N) : panels_(LayerShape{Cell::rnn_tanh, K, N}) {}

  Index packed() const { return panels_.size(); }
  void pack(const S* weight, const S* bias, S* packed) const {
    for (Index j = 0; j < panels_.count(); ++j) {
      S* const start = panels_.bias(packed, j);
      for (Index i = 0; i < width; ++i) start[i] = S(0);
      for (Index q = 0; q < panels_.packets(j); ++q) panels_.add_bias(bias, j, q, start);
      panels_.pack(weight, panels_.I, j, all_packets, panels_.x(packed, j));
    }
  }
  void unpack(const S* packed, S* weight, S* bias) const {
    for (Index j = 0; j < panels_.count(); ++j) {
      panels_.unpack(panels_.x(packed, j), panels_.I, j, all_packets, false, weight);
      for (Index i = 0; bias && i < width && j * width + i < panels_.H; ++i) {
        bias[j * width + i] = panels_.bias(packed, j)[i];
      }
    }
  }
  Index columns() const { return panels_.reverse_size(panels_.I, all_packets); }
  void pack_columns(const S* weight, S* to) const {
    panels_.pack_reverse(weight, panels_.I, all_packets, to);
  }
  Index sums(Index stride) const { return panels_.count() * stride * width; }
  Index panels() const { return panels_.count(); }

  void multiply(Index row, Index n, Index stride, const S* x, const S* packed, S* sums) const {
    for (Index j = 0; j < panels_.count(); ++j) {
      S* const to = sums + (j * stride + row) * width;
      const Index Q = panels_.packets(j);
      const S* const bias = panels_.bias(packed, j);
      for (Index r = 0; r < n; ++r)
        for (Index q = 0; q < Q; ++q) store(to + r * width + q * p, load(bias + q * p));
      for_row_tiles(n, Q, [&](Index R, Index at) {
        RowsProduct<S> product(to + at * width, width, panels_.I, panels_.x(packed, j));
        for (Index r = 0; r < R; ++r) product.a[r] = x + (at + r) * panels_.I;
        multiply_rows(R, Q, false, product);
      });
    }
  }

  // Calls body(values of a row, the panel's part of them, how many) for rows and panels.
  template <class T, class U, class F>
  void for_parts(Index row, Index n, Index stride, T* sums, U* y, Index step, F&& body) const {
    const Index N = panels_.H;
    for (Index r = 0; r < n; ++r) {
      for (Index j = 0; j < panels_.count(); ++j) {
        const Index valid = N - j * width < width ? N - j * width : width;
        body(y + r * step + j * width, sums + (j * stride + row + r) * width, valid);
      }
    }
  }
  void read(Index row, Index n, Index stride, const S* sums, S* y, Index step) const {
    for_parts(row, n, stride, sums, y, step, [](S* to, const S* from, Index valid) {
      for (Index i = 0; i < valid; ++i) to[i] = from[i];
    });
  }
  void write(Index row, Index n, Index stride, const S* y, Index step, S* sums) const {
    for_parts(row, n, stride, sums, y, step, [](const S* from, S* to, Index valid) {
      for (Index i = 0; i < valid; ++i) to[i] = from[i];
      for (Index i = valid; i < width; ++i) to[i] = S(0);
    });
  }

  void grad_x(Index row, Index n, Index stride, const S* sums, const S* columns, S* scratch,
              S* to) const {
    const Index K = panels_.I, J = panels_.count();
    for (Index panel = 0; panel < P::reverse_panels(K); ++panel) {
      const Index Q = P::reverse_packets(K, panel);
      const S* const weights = panels_.reverse_panel(columns, all_packets, panel);
      for (Index i = 0; i < n * 4; ++i) store(scratch + i * p, constant<S>(0));
      for_row_tiles(n, Q, [&](Index R, Index at) {
        // The last panel may be shorter.
        const Index even = J - 1;
        RowsProduct<S> product(scratch + at * width, width, width, weights, even, stride * width);
        product.K_behind = panels_.packets(even) * p;
        product.panel_behind = weights + even * width * Q * p;
        for (Index r = 0; r < R; ++r) {
          product.a[r] = sums + (row + at + r) * width;
          product.behind[r] = sums + (even * stride + row + at + r) * width;
        }
        multiply_rows(R, Q, false, product);
      });
      for (Index r = 0; r < n; ++r) {
        for (Index q = 0; q < Q; ++q) {
          const Index first = (panel * 4 + q) * p;
          store(to + r * K + first, load(scratch + r * width + q * p), P::valid(K, first));
        }
      }
    }
  }

  // Of panels [begin, end) the weights of columns [from, to), and the bias with the first column.
  void add_gradient(Index n, Index stride, const S* x, const S* sums, Index begin, Index end,
                    Index from_column, Index to_column, S* gradient) const {
    const Index K = panels_.I;
    // Few enough rows at a time that their gradients stay in the first caches for all columns.
    constexpr Index most = panel_bytes / (Index(sizeof(S)) * width);
    for (Index j = begin; j < end; ++j) {
      const Index Q = panels_.packets(j);
      S* const bias = panels_.bias(gradient, j);
      for (Index last = n; last > 0; last -= most) {
        const Index first = last > most ? last - most : 0;
        const S* const from = sums + j * stride * width;
        for (Index q = 0; q < Q && from_column == 0; ++q) {
          Packet<S> sum = load(bias + q * p);
          for (Index r = last - 1; r >= first; --r) {
            sum = padd(sum, load(from + r * width + q * p));
          }
          store(bias + q * p, sum);
        }
        ColumnsProduct<S> product{};
        product.a_row = -K;
        product.runs = 1;
        product.K = last - first;
        product.panel = from + (last - 1) * width;
        product.panel_row = -width;
        for_row_tiles(to_column - from_column, Q, [&](Index R, Index tile) {
          const Index i = from_column + tile;
          product.sums = panels_.x(gradient, j) + i * Q * p;
          product.a = x + (last - 1) * K + i;
          multiply_columns(R, Q, product);
        });
        if (first == 0) break;
      }
    }
  }

 private:
  const P panels_;
};

template <class S>
void multiply_directly(Index K, Index N, Index n, const S* x, const S* weight, const S* bias,
                       S* y) {
  constexpr Index p = lanes<S>;
  for (Index r = 0; r < n; ++r) {
    for (Index first = 0; first < N; first += p) {
      const Index valid = N - first < p ? N - first : p;
      const Packet<S> sum = dots(weight + first * K, valid, x + r * K, K);
      store(y + r * N + first, bias ? padd(sum, load(bias + first, valid)) : sum, valid);
    }
  }
}

// Eigen's sums go by the alignment of a row, so that is the same for all.
//
// -log softmax(l)[k] = log(sum of exp(l - m)) + m - l[k], with m the largest, so that exp is at
// most 1.
template <class S>
double cross_entropy(Index n, Index N, S* logits, Index step, const std::int64_t* target,
                     std::int64_t ignore, double scale) {
  double sum = 0;
  for (Index r = 0; r < n; ++r) {
    Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>> row(logits + r * step, N);
    if (target[r] == ignore) {
      row.setZero();
      continue;
    }
    const S largest = row.maxCoeff();
    const S wanted = row[target[r]];
    row = (row - largest).exp();
    const S total = row.sum();
    sum += std::log(double(total)) + double(largest) - double(wanted);
    row *= S(scale) / total;
    row[target[r]] -= S(scale);
  }
  return sum;
}

// Calls body with what computes a readout from K values to N.
template <class S, class F>
FASTBPTT_INLINE auto with_rows(Index K, Index N, F&& body) {
  return N <= FewOutputs<S>::most ? body(FewOutputs<S>(K, N)) : body(Rows<S>(K, N));
}

template <class S>
constexpr RowsKernels<S> rows_kernels() {
  return {
      [](Index K, Index N) { return with_rows<S>(K, N, [&](auto rows) { return rows.packed(); }); },
      [](Index K, Index N, const S* weight, const S* bias, S* packed) {
        with_rows<S>(K, N, [&](auto rows) { rows.pack(weight, bias, packed); });
      },
      [](Index K, Index N, const S* packed, S* weight, S* bias) {
        with_rows<S>(K, N, [&](auto rows) { rows.unpack(packed, weight, bias); });
      },
      [](Index K, Index N) {
        return with_rows<S>(K, N, [&](auto rows) { return rows.columns(); });
      },
      [](Index K, Index N, const S* weight, S* columns) {
        with_rows<S>(K, N, [&](auto rows) { rows.pack_columns(weight, columns); });
      },
      [](Index N, Index stride) {
        return with_rows<S>(1, N, [&](auto rows) { return rows.sums(stride); });
      },
      [](Index N) { return with_rows<S>(1, N, [&](auto rows) { return rows.panels(); }); },
      [](Index K, Index N, Index row, Index n, Index stride, const S* x, const S* packed, S* sums) {
        with_rows<S>(K, N, [&](auto rows) { rows.multiply(row, n, stride, x, packed, sums); });
      },
      [](Index N, Index row, Index n, Index stride, const S* sums, S* y, Index step) {
        with_rows<S>(1, N, [&](auto rows) { rows.read(row, n, stride, sums, y, step); });
      },
      [](Index N, Index row, Index n, Index stride, const S* y, Index step, S* sums) {
        with_rows<S>(1, N, [&](auto rows) { rows.write(row, n, stride, y, step, sums); });
      },
      [](Index K, Index N, Index row, Index n, Index stride, const S* sums, const S* columns,
         S* scratch, S* to) {
        with_rows<S>(K, N, [&](auto rows) {
          return rows.grad_x(row, n, stride, sums, columns, scratch, to);
        });
      },
      [](Index K, Index N, Index n, Index stride, const S* x, const S* sums, Index begin, Index end,
         Index from, Index to, S* gradient) {
        with_rows<S>(K, N, [&](auto rows) {
          rows.add_gradient(n, stride, x, sums, begin, end, from, to, gradient);
        });
      },
      lanes<S>,
      &multiply_directly<S>,
      &cross_entropy<S>,
  };
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
