// Layer normalisation inside a step: the statistics of a row, and the cell of a row from its two
// products, forward and backward. A row needs all its sums before any gate is known, so a step is
// the products of all panels, and then row after row.
//
// With v^ = s (v - mean(v)), s = 1 / sqrt(mean((v - mean(v))^2) + epsilon), and d = dL/dv^:
//
//   dL/dv = s (d - mean(d) - v^ mean(d v^))
#pragma once
#include "cells/normalised.h"
#include "cells/optioned.h"
#include "kernels/panels.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

constexpr double norm_epsilon = 1e-5;

template <class S>
struct Statistics {
  S mean;
  S scale;
};

// Zeros in the lanes from n on.
template <class S>
FASTBPTT_INLINE Packet<S> first_lanes(const Packet<S>& value, Index n) {
  if (n == lanes<S>) return value;
  alignas(64) S values[lanes<S>];
  store(values, value);
  return load(values, n);
}

// Of values whose squares are too large: they are divided by the largest first.
template <class S>
__attribute__((noinline)) Statistics<S> large_statistics(const S* row, Index step, Index Q,
                                                         Index H) {
  constexpr Index p = lanes<S>;
  const auto each = [&](auto&& body) {
    for (Index i = 0; i < H; ++i)
      for (Index q = 0; q < Q; ++q) body(row[i / p * step + q * p + i % p]);
  };
  S most = 0, mean = 0, variance = 0;
  each([&](S value) {
    const S size = value < 0 ? -value : value;
    if (size > most) most = size;
  });
  each([&](S value) { mean += value / most / S(Q * H); });
  each([&](S value) {
    const S difference = value / most - mean;
    variance += difference * difference / S(Q * H);
  });
  const S epsilon = S(norm_epsilon) / most / most;
  const S least = Eigen::NumTraits<S>::highest() > 1e100 ? S(1e-300) : S(1e-36);
  variance += epsilon > least ? epsilon : least;
  return {mean * most, 1 / (most * Eigen::numext::sqrt(variance))};
}

// Of Q packets of each panel, panels `step` apart, for H units. Two passes: the sum of squares
// alone would cancel.
template <int Q, class S>
__attribute__((noinline)) Statistics<S> statistics(const S* row, Index step, Index H) {
  constexpr Index p = lanes<S>;
  const Index last = ceil_div(H, p) - 1;
  const S count = S(Q * H);
  Packet<S> sums[Q], squares[Q];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) sums[q] = squares[q] = constant<S>(0);
  // The lanes behind H are zero.
  for (Index j = 0; j <= last; ++j) {
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) sums[q] = padd(sums[q], load(row + j * step + q * p));
  }
  const auto total = [](Packet<S>* values) {
    for (int q = 1; q < Q; ++q) values[0] = padd(values[0], values[q]);
    return Eigen::internal::predux(values[0]);
  };
  const S mean = total(sums) / count;
  const Packet<S> center = pset1<Packet<S>>(mean);
  const auto add = [&](Index j, Index n) {
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const Packet<S> difference = first_lanes<S>(psub(load(row + j * step + q * p), center), n);
      squares[q] = pmadd(difference, difference, squares[q]);
    }
  };
  for (Index j = 0; j < last; ++j) add(j, p);
  add(last, H - last * p);
  const S variance = total(squares) / count;
  if (!(variance <= Eigen::NumTraits<S>::highest())) return large_statistics(row, step, Q, H);
  return {mean, 1 / Eigen::numext::sqrt(variance + S(norm_epsilon))};
}

// The vectors beside the weights, panel by panel: gains of x and h', gain and shift of c, biases;
// and gradients, in the same places.
template <class S, class Cell>
struct NormVectors {
  static constexpr Index p = lanes<S>;
  static constexpr Index width = Cell::packets * p;
  static constexpr Index cells = Cell::has_c ? p : 0;
  static constexpr Index step = 3 * width + 2 * cells;
  Panels<S, Cell> panels;

  explicit NormVectors(const LayerShape& s) : panels(s) {}
  Index size() const { return panels.count() * step; }

  template <class T>
  static T* gain_x(T* data, Index j) {
    return data + j * step;
  }
  template <class T>
  static T* gain_h(T* data, Index j) {
    return gain_x(data, j) + width;
  }
  template <class T>
  static T* gain_c(T* data, Index j) {
    return gain_h(data, j) + width;
  }
  template <class T>
  static T* shift_c(T* data, Index j) {
    return gain_c(data, j) + cells;
  }
  template <class T>
  static T* bias(T* data, Index j) {
    return shift_c(data, j) + cells;
  }

  void pack(const Weights<const S>& w, S* to) const {
    for (Index i = 0; i < size(); ++i) to[i] = S(0);
    for (Index j = 0; j < panels.count(); ++j) {
      for (Index q = 0; q < Cell::packets; ++q) {
        if (Cell::of_x(q)) {
          panels.add_bias(w.gain_ih, j, q, gain_x(to, j));
          panels.add_bias(w.b_ih, j, q, bias(to, j));
        }
        if (Cell::of_h(q)) {
          panels.add_bias(w.gain_hh, j, q, gain_h(to, j));
          panels.add_bias(w.b_hh, j, q, bias(to, j));
        }
      }
      for (Index lane = 0; Cell::has_c && lane < panels.units(j * p); ++lane) {
        gain_c(to, j)[lane] = w.gain_c[j * p + lane];
        if (w.shift_c) shift_c(to, j)[lane] = w.shift_c[j * p + lane];
      }
    }
  }

  // Gradients but those of the biases, written or added.
  void unpack(const S* from, bool add, const Weights<S>& grad) const {
    const auto write = [&](S* to, const S* values, Index n) {
      for (Index i = 0; i < n && to; ++i) to[i] = (add ? to[i] : S(0)) + values[i];
    };
    const auto row = [](S* to, Index at) { return to ? to + at : nullptr; };
    for (Index j = 0; j < panels.count(); ++j) {
      const Index n = panels.units(j * p);
      for (Index q = 0; q < Cell::packets; ++q) {
        const Index at = panels.weight_row(j, q);
        if (Cell::of_x(q)) write(row(grad.gain_ih, at), gain_x(from, j) + q * p, n);
        if (Cell::of_h(q)) write(row(grad.gain_hh, at), gain_h(from, j) + q * p, n);
      }
      if (!Cell::has_c) continue;
      write(row(grad.gain_c, j * p), gain_c(from, j), n);
      write(row(grad.shift_c, j * p), shift_c(from, j), n);
    }
  }
};

// What a row of a step is made of; of a cell's own arrays `unit(j)` and `option(j)` tell.
template <class S>
struct NormForwardRow {
  const S* vectors;  // of NormVectors
  const S* x;        // W_ih x, panels x_step apart
  Index x_step;
  const S* h;  // W_hh h'
  Index h_step;
  S* statistics;  // written; null: not wanted
  S* spare;       // forward_spare values
};

template <class S>
struct NormReverseRow {
  const S* vectors;
  const S* grad_h;  // dL/dh, whole packets
  const S* statistics;
  S* x_grads;  // written: dL/d(W_ih x), panels x_step apart
  Index x_step;
  S* h_grads;  // written: dL/d(W_hh h')
  Index h_step;
  S* shares;  // written: the row's part of the gradients of shift_c, gain_c and the peepholes
  Index shares_step;
  Index shares_packets;
  S* spare;  // reverse_spare values
};

template <class S, class Cell>
class NormRows {
  static constexpr Index p = lanes<S>;
  static constexpr Index width = Cell::packets * p;
  using Plain = typename Cell::Plain;
  using Vectors = NormVectors<S, Cell>;

  struct Group {
    S mean[2];
    S scale[2];
  };
  static Group statistics_of(const S* sums, Index step, Index H, int lone) {
    Group g{};
    Statistics<S> s;
    if constexpr (Cell::groups == 1) {
      s = statistics<Cell::packets>(sums, step, H);
    } else {
      const Statistics<S> apart = statistics<1>(sums + lone * p, step, H);
      g.mean[1] = apart.mean, g.scale[1] = apart.scale;
      s = statistics<2>(sums + p, step, H);
    }
    g.mean[0] = s.mean, g.scale[0] = s.scale;
    return g;
  }

  // Sums of the gates from normalised products.
  struct Products {
    Packet<S> x[Cell::packets];
    Packet<S> h[Cell::packets];
    FASTBPTT_INLINE void mix(const S* vectors, Index j, S* sums) const {
#pragma GCC unroll 4
      for (int q = 0; q < Cell::packets; ++q) {
        Packet<S> sum = load(Vectors::bias(vectors, j) + q * p);
        if (Cell::of_x(q)) sum = pmadd(load(Vectors::gain_x(vectors, j) + q * p), x[q], sum);
        if (Cell::of_h(q)) sum = pmadd(load(Vectors::gain_h(vectors, j) + q * p), h[q], sum);
        store(sums + q * p, sum);
      }
    }
    FASTBPTT_INLINE void keep(const TapeUnit<S>& tape, Index n) const {
#pragma GCC unroll 4
      for (int q = 0; q < Cell::packets; ++q) {
        if (Cell::of_x(q)) tape.keep(q - Cell::x_first, x[q], n);
        if (Cell::of_h(q)) tape.keep(Cell::x_count + q - Cell::h_first, h[q], n);
      }
    }
    FASTBPTT_INLINE void recall(const TapeUnit<const S>& tape, Index n) {
#pragma GCC unroll 4
      for (int q = 0; q < Cell::packets; ++q) {
        if (Cell::of_x(q)) x[q] = tape.value(q - Cell::x_first, n);
        if (Cell::of_h(q)) h[q] = tape.value(Cell::x_count + q - Cell::h_first, n);
      }
    }
  };

 public:
  static Index forward_spare(const LayerShape& s) {
    return Cell::has_c ? 2 * Panels<S, Cell>(s).count() * p : 0;
  }
  static Index reverse_spare(const LayerShape& s) {
    return Cell::has_c ? kept * Panels<S, Cell>(s).count() * p : 0;
  }
  // Packets of a row's shares a panel.
  static Index shares(const LayerShape& s) {
    return Cell::has_c ? 2 + (s.options.peephole ? peepholes(s.cell) : 0) : 0;
  }

  template <class Unit, class Option>
  static void forward(const Panels<S, Cell>& panels, const NormForwardRow<S>& row, Unit&& unit,
                      Option&& option) {
    const Index J = panels.count(), H = panels.H;
    const Group of_x = statistics_of(row.x, row.x_step, H, 0);
    const Group of_h = statistics_of(row.h, row.h_step, H, 3);
    S* const cells = row.spare;
    S* const outputs = row.spare + J * p;
    for (Index j = 0; j < J; ++j) {
      const ForwardUnit<S> u = unit(j);
      Products products;
#pragma GCC unroll 4
      for (int q = 0; q < Cell::packets; ++q) {
        const auto normal = [&](const S* sums, Index step, const Group& g) {
          const Packet<S> mean = pset1<Packet<S>>(g.mean[Cell::group(q)]);
          return pmul(psub(load(sums + j * step + q * p), mean),
                      pset1<Packet<S>>(g.scale[Cell::group(q)]));
        };
        if (Cell::of_x(q)) products.x[q] = normal(row.x, row.x_step, of_x);
        if (Cell::of_h(q)) products.h[q] = normal(row.h, row.h_step, of_h);
      }
      alignas(64) S sums[width];
      products.mix(row.vectors, j, sums);
      if (u.tape) products.keep(u.tape, u.n);
      if constexpr (Cell::has_c) {
        const LstmGates<S> a = Plain::template gates<true>(sums, load(u.c, u.n), u.peephole, u.n);
        store(cells + j * p, first_lanes<S>(a.c, u.n));
        store(outputs + j * p, a.o);
      } else {
        ForwardUnit<S> own = u;
        own.tape = {};
        OptionedCell<S, Plain>::forward(sums, own, option(j));
      }
    }
    Statistics<S> of_c{};
    if constexpr (Cell::has_c) {
      of_c = statistics<1>(cells, p, H);
      const Packet<S> mean = pset1<Packet<S>>(of_c.mean), scale = pset1<Packet<S>>(of_c.scale);
      for (Index j = 0; j < J; ++j) {
        const ForwardUnit<S> u = unit(j);
        const OptionUnit<S> o = option(j);
        const Packet<S> c = load(cells + j * p);
        const Packet<S> inside =
            pmadd(load(Vectors::gain_c(row.vectors, j)), pmul(psub(c, mean), scale),
                  load(Vectors::shift_c(row.vectors, j)));
        const Packet<S> h = pmul(load(outputs + j * p), tanh_of(inside));
        OptionedCell<S, Cell>::keep(u, o, h, c);
      }
    }
    if (!row.statistics) return;
    if constexpr (Cell::has_c) {
      const S all[norm_statistics] = {of_x.scale[0], of_h.scale[0], of_c.mean, of_c.scale};
      for (Index i = 0; i < norm_statistics; ++i) row.statistics[i] = all[i];
    } else {
      const S all[norm_statistics] = {of_x.scale[0], of_x.scale[1], of_h.scale[0], of_h.scale[1]};
      for (Index i = 0; i < norm_statistics; ++i) row.statistics[i] = all[i];
    }
  }

  // A step that is missing: the state is carried over, and the tape holds no products.
  template <class Unit, class Option>
  static void skip_forward(const Panels<S, Cell>& panels, Unit&& unit, Option&& option) {
    for (Index j = 0; j < panels.count(); ++j) {
      const ForwardUnit<S> u = unit(j);
      Products products;
      for (int q = 0; q < Cell::packets; ++q) products.x[q] = products.h[q] = constant<S>(0);
      if (u.tape) products.keep(u.tape, u.n);
      OptionedCell<S, Cell>::carry_over(u, option(j));
    }
  }

  template <class Unit, class Option>
  static void backward(const Panels<S, Cell>& panels, const NormReverseRow<S>& row, bool optioned,
                       Unit&& unit, Option&& option) {
    const Index J = panels.count();
    const S* const v = row.vectors;
    Means x[2], h[2];
    const auto add = [&](Index j, const ReverseUnit<S>& u, const Products& products) {
#pragma GCC unroll 4
      for (int q = 0; q < Cell::packets; ++q) {
        const Packet<S> grad = load(u.grads + q * p);
        if (Cell::of_x(q)) {
          const Packet<S> d = pmul(grad, load(Vectors::gain_x(v, j) + q * p));
          x[Cell::group(q)].add(d, products.x[q]);
          store(row.x_grads + j * row.x_step + (q - Cell::x_first) * p, d);
        }
        if (Cell::of_h(q)) {
          const Packet<S> d = pmul(grad, load(Vectors::gain_h(v, j) + q * p));
          h[Cell::group(q)].add(d, products.h[q]);
          store(row.h_grads + j * row.h_step + (q - Cell::h_first) * p, d);
        }
      }
    };
    if constexpr (Cell::has_c) {
      cells_backward(panels, row, optioned, unit, option, add);
    } else {
      for (Index j = 0; j < J; ++j) {
        ReverseUnit<S> u = unit(j);
        Products products;
        products.recall(u.tape, u.n);
        alignas(64) S sums[width], gates[Plain::tape * p], ignored[p];
        products.mix(v, j, sums);
        Plain::forward(sums, {u.n, u.h_before, ignored, nullptr, nullptr, {gates, nullptr}, {}});
        u.tape = {gates, nullptr};
        const Packet<S> grad = load(row.grad_h + j * p);
        if (optioned)
          OptionedCell<S, Plain>::backward(grad, u, option(j));
        else
          Plain::backward(grad, u);
        add(j, u, products);
      }
    }
    for (int g = 0; g < Cell::groups; ++g) {
      const S count = S(Cell::group_size(g) * panels.H);
      x[g].finish(count, row.statistics[g]);
      h[g].finish(count, row.statistics[Cell::groups + g]);
    }
    for (Index j = 0; j < J; ++j) {
      const ReverseUnit<S> u = unit(j);
      Products products;
      products.recall(u.tape, u.n);
#pragma GCC unroll 4
      for (int q = 0; q < Cell::packets; ++q) {
        const auto finish = [&](S* grad, const Means& means, const Packet<S>& normal) {
          store(grad, first_lanes<S>(means.through(load(grad), normal), u.n));
        };
        if (Cell::of_x(q)) {
          finish(row.x_grads + j * row.x_step + (q - Cell::x_first) * p, x[Cell::group(q)],
                 products.x[q]);
        }
        if (Cell::of_h(q)) {
          finish(row.h_grads + j * row.h_step + (q - Cell::h_first) * p, h[Cell::group(q)],
                 products.h[q]);
        }
      }
    }
  }

  template <class Unit, class Option>
  static void skip_backward(const Panels<S, Cell>& panels, const NormReverseRow<S>& row,
                            Unit&& unit, Option&& option) {
    const auto clear = [](S* to, Index packets) {
      for (Index q = 0; q < packets; ++q) store(to + q * p, constant<S>(0));
    };
    for (Index j = 0; j < panels.count(); ++j) {
      clear(row.x_grads + j * row.x_step, Cell::x_count);
      clear(row.h_grads + j * row.h_step, Cell::h_count);
      clear(row.shares + j * row.shares_step, row.shares_packets);
      OptionedCell<S, Cell>::pass_back(load(row.grad_h + j * p), unit(j), option(j));
    }
  }

  // Adds the parts of all rows, the last first, to the gradients of panel j's vectors, of its bias,
  // and of its peepholes, which are H apart. tape(row) is that of the panel's units.
  template <class Tape>
  static void gather(Index n, Index rows, const S* grads, const S* shares, Index shares_packets,
                     Tape&& tape, S* vectors, S* bias, Index H, S* peepholes) {
    Packet<S> sums[3][Cell::packets];
    S* const to[] = {bias, Vectors::gain_x(vectors, 0), Vectors::gain_h(vectors, 0)};
    for (int k = 0; k < 3; ++k)
      for (int q = 0; q < Cell::packets; ++q) sums[k][q] = load(to[k] + q * p);
    for (Index row = rows - 1; row >= 0; --row) {
      Products products;
      products.recall(tape(row), n);
#pragma GCC unroll 4
      for (int q = 0; q < Cell::packets; ++q) {
        const Packet<S> grad = load(grads + row * width + q * p);
        sums[0][q] = padd(sums[0][q], grad);
        if (Cell::of_x(q)) sums[1][q] = pmadd(grad, products.x[q], sums[1][q]);
        if (Cell::of_h(q)) sums[2][q] = pmadd(grad, products.h[q], sums[2][q]);
      }
    }
    for (int k = 0; k < 3; ++k)
      for (int q = 0; q < Cell::packets; ++q) store(to[k] + q * p, sums[k][q]);
    for (Index k = 0; k < shares_packets; ++k) {
      S* const own = k == 0   ? Vectors::shift_c(vectors, 0)
                     : k == 1 ? Vectors::gain_c(vectors, 0)
                              : peepholes + (k - 2) * H;
      const Index valid = k < 2 ? p : n;
      Packet<S> sum = load(own, valid);
      for (Index row = rows - 1; row >= 0; --row) {
        sum = padd(sum, load(shares + (row * shares_packets + k) * p));
      }
      store(own, sum, valid);
    }
  }

 private:
  // The two means of the way back.
  struct Means {
    Packet<S> sum = constant<S>(0);
    Packet<S> along = constant<S>(0);
    Packet<S> scale;
    FASTBPTT_INLINE void add(const Packet<S>& d, const Packet<S>& normal) {
      sum = padd(sum, d);
      along = pmadd(d, normal, along);
    }
    FASTBPTT_INLINE void finish(S count, S s) {
      sum = pset1<Packet<S>>(Eigen::internal::predux(sum) / count);
      along = pset1<Packet<S>>(Eigen::internal::predux(along) / count);
      scale = pset1<Packet<S>>(s);
    }
    FASTBPTT_INLINE Packet<S> through(const Packet<S>& d, const Packet<S>& normal) const {
      return pmul(scale, psub(psub(d, sum), pmul(normal, along)));
    }
  };

  // Kept of a row from the first pass over its panels to the second: i, f, g, o, c, the gradient of
  // o's sum, that of N(c), and N(c).
  static constexpr Index kept = 8;

  template <class Unit, class Option, class Add>
  static FASTBPTT_INLINE void cells_backward(const Panels<S, Cell>& panels,
                                             const NormReverseRow<S>& row, bool optioned,
                                             Unit&& unit, Option&& option, Add&& add) {
    const Index J = panels.count();
    const S* const v = row.vectors;
    const Packet<S> mean = pset1<Packet<S>>(row.statistics[2]),
                    scale = pset1<Packet<S>>(row.statistics[3]);
    Means means;
    for (Index j = 0; j < J; ++j) {
      const ReverseUnit<S> u = unit(j);
      const OptionUnit<S> o = option(j);
      Products products;
      products.recall(u.tape, u.n);
      alignas(64) S sums[width];
      products.mix(v, j, sums);
      const LstmGates<S> a =
          Plain::template gates<true>(sums, u.c_before.value(u.n), u.peephole, u.n);
      const Packet<S> normal = first_lanes<S>(pmul(psub(a.c, mean), scale), u.n);
      const Packet<S> t =
          tanh_of(pmadd(load(Vectors::gain_c(v, j)), normal, load(Vectors::shift_c(v, j))));
      Packet<S> grad = load(row.grad_h + j * p);
      if (o.keep_h) grad = psub(grad, pmul(load(o.keep_h, u.n), grad));
      const Packet<S> through_o = pmul(grad, a.o);
      const Packet<S> inside = pmul(through_o, one_minus<S>(pmul(t, t)));
      S* const shares = row.shares + j * row.shares_step;
      store(shares, inside);
      store(shares + p, pmul(inside, normal));
      const Packet<S> d = pmul(inside, load(Vectors::gain_c(v, j)));
      means.add(d, normal);
      if (u.output) store(u.output, pmul(a.o, t), u.n);
      const Packet<S> all[kept] = {
          a.i, a.f, a.g, a.o, a.c, pmul(pmul(through_o, t), one_minus<S>(a.o)), d, normal};
#pragma GCC unroll 8
      for (Index i = 0; i < kept; ++i) store(row.spare + (j * kept + i) * p, all[i]);
    }
    means.finish(S(panels.H), row.statistics[3]);
    for (Index j = 0; j < J; ++j) {
      ReverseUnit<S> u = unit(j);
      const OptionUnit<S> o = option(j);
      Products products;
      products.recall(u.tape, u.n);
      Packet<S> all[kept];
#pragma GCC unroll 8
      for (Index i = 0; i < kept; ++i) all[i] = load(row.spare + (j * kept + i) * p);
      Packet<S> carry = load(u.carry_c, u.n), past = constant<S>(0);
      if (o.grad_c_out) carry = padd(carry, load(o.grad_c_out, u.n));
      if (o.keep_c) past = pmul(load(o.keep_c, u.n), carry);
      const Packet<S> through = first_lanes<S>(means.through(all[6], all[7]), u.n);
      if (u.peephole.data) {
        u.grad_peephole = {row.shares + j * row.shares_step + 2 * p, p};
        for (Index k = 2; k < row.shares_packets; ++k) {
          store(row.shares + j * row.shares_step + k * p, constant<S>(0));
        }
      }
      Plain::template gates_back<true>({all[0], all[1], all[2], all[3], all[4]},
                                       u.c_before.value(u.n), padd(psub(carry, past), through),
                                       all[5], u);
      if (o.keep_c) store(u.carry_c, padd(load(u.carry_c, u.n), past), u.n);
      if (optioned && u.carry_h) {
        const Packet<S> grad = load(row.grad_h + j * p);
        store(u.carry_h, o.keep_h ? pmul(load(o.keep_h, u.n), grad) : constant<S>(0), u.n);
      }
      add(j, u, products);
    }
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
