// One layer backward through a run of steps, in three parts:
//   1. step after step, the recurrent product of the gate gradients of the step after and the cell,
//      which writes the gate gradients of this step, in panel layout;
//   2. the weight gradients of the run, while its gate gradients are still in the cache;
//   3. the gradient of the input, if asked for.
//
// Sums over time go from the last step to the first and are carried on in memory from run to run,
// so that where time is cut does not change the bits.
#pragma once
#include "kernels/layer_forward.h"
#include "kernels/micro_kernel.h"
#include "kernels/panels.h"
#include "kernels/reverse_parts.h"
#include "kernels/second_product.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S, class Cell>
class ReverseLayer {
  static constexpr Index p = lanes<S>;
  static constexpr Index width = Cell::packets * p;
  using Parts = ReverseParts<S, Cell>;

 public:
  // The weights: W_hh for the recurrent product, those of the second product, and W_ih for dx; and
  // the vectors of layer normalisation.
  static Index packed(const LayerShape& s) {
    return norm_offset(s) + norm_vectors(s) + Parts::packed(s);
  }
  static void pack(const LayerShape& s, const Weights<const S>& w, S* to) {
    const Panels<S, Cell> panels(s);
    if (s.options.parts == 0) pack_plain(s, w, to);
    SecondProduct<S, Cell>(s).pack_reverse(w, to + second_offset(panels));
    if constexpr (normalised) NormVectors<S, Cell>(s).pack(w, to + norm_offset(s));
    Parts::pack(s, w, to + norm_offset(s));
  }

  static Index scratch(const LayerShape& s, Index steps, Index batch, int team) {
    const Panels<S, Cell> panels(s);
    const Index rows = steps * batch;
    const bool seen = s.options.resets || s.options.recurrent_dropout > 0;
    const SecondProduct<S, Cell> second(s);
    return kept(s) + panels.count() * rows * width + team * sums_size(s, rows) +
           rows * (second.sums_row() + second.input_row()) + (seen ? rows * s.output_size() : 0) +
           (s.options.mask ? rows * s.input_size : 0) + StepView<S>::scratch(s, batch) +
           norm_scratch(s, rows, batch, team) + Parts::scratch(s, steps, batch, team);
  }
  // The weight gradients, zeros, and the gradients of the peepholes and of the vectors of layer
  // normalisation.
  static Index kept(const LayerShape& s) { return norm_gradient(s) + norm_vectors(s); }
  static Index zeros(const LayerShape& s) {
    return Panels<S, Cell>(s).size() + SecondProduct<S, Cell>(s).size();
  }
  // What is not written by the first run.
  static void begin(const LayerShape& s, S* scratch) {
    const Index n = kept(s);
    for (Index i = zeros(s); i < n; ++i) scratch[i] = S(0);
  }
  static void run(const ReverseJob<S>& job) { ReverseLayer(job).run(); }

  static void finish(const LayerShape& s, const S* scratch, bool add, const Weights<S>& grad) {
    using P = Panels<S, Cell>;
    const P panels(s);
    for (Index j = 0; j < panels.count(); ++j) {
      const S* const bias = panels.bias(scratch, j);
      for (Index q = 0; q < panels.packets(j); ++q) {
        const Index row = panels.weight_row(j, q), n = panels.units(panels.unit(j, q));
        for (Index lane = 0; lane < n; ++lane) {
          const S sum = bias[q * p + lane];
          for (S* const to :
               {P::takes_b_ih(q) ? grad.b_ih : nullptr, P::takes_b_hh(q) ? grad.b_hh : nullptr}) {
            if (to) to[row + lane] = (add ? to[row + lane] : S(0)) + sum;
          }
        }
      }
      panels.unpack(panels.x(scratch, j), s.input_size, j, x_range<Cell>, add, grad.w_ih);
      panels.unpack(panels.h(scratch, j), panels.R, j, h_range<Cell>, add, grad.w_hh);
    }
    SecondProduct<S, Cell>(s).unpack(scratch + panels.size(), add, grad);
    const S* const peephole = scratch + zeros(s) + s.hidden_size;
    const Index n = grad.peephole ? peepholes(s.cell) * s.hidden_size : 0;
    for (Index i = 0; i < n; ++i) {
      grad.peephole[i] = (add ? grad.peephole[i] : S(0)) + peephole[i];
    }
    if constexpr (normalised) {
      NormVectors<S, Cell>(s).unpack(scratch + norm_gradient(s), add, grad);
    }
  }

 private:
  static void pack_plain(const LayerShape& s, const Weights<const S>& w, S* to) {
    const Panels<S, Cell> panels(s);
    panels.pack_reverse(w.w_hh, panels.R, h_range<Cell>, to);
    panels.pack_reverse(w.w_ih, s.input_size, x_range<Cell>, to + x_offset(s));
  }

  static constexpr bool normalised = is_normalised<Cell>;
  static Index norm_vectors(const LayerShape& s) {
    if constexpr (normalised) return NormVectors<S, Cell>(s).size();
    return 0;
  }
  static Index norm_offset(const LayerShape& s) {
    return x_offset(s) + Panels<S, Cell>(s).reverse_size(s.input_size, x_range<Cell>);
  }
  static Index norm_gradient(const LayerShape& s) {
    return zeros(s) + (1 + (s.options.peephole ? peepholes(s.cell) : 0)) * s.hidden_size;
  }
  // The gradients of the two products [panels][steps * B][count * p], the shares of each row
  // [panels][steps * B][shares * p], dL/dh of a step [B][panels * p], and what each thread keeps.
  static Index norm_scratch(const LayerShape& s, Index rows, Index batch, int team) {
    if constexpr (normalised) {
      const Index panel = (Cell::x_count + Cell::h_count + NormRows<S, Cell>::shares(s)) * p;
      return Panels<S, Cell>(s).count() * (rows * panel + batch * p) +
             team * NormRows<S, Cell>::reverse_spare(s);
    }
    return 0;
  }
  explicit ReverseLayer(const ReverseJob<S>& job)
      : job_(job),
        panels_(job.shape),
        second_(job.shape),
        rows_(job.steps * job.batch),
        zeros_(job.scratch + zeros(job.shape)),
        parts_(job, panels_, job.packed + norm_offset(job.shape), job.scratch + kept(job.shape)),
        grads_(job.scratch + kept(job.shape) +
               Parts::scratch(job.shape, job.steps, job.batch, job.team.size)),
        second_grads_(grads_ + panels_.count() * rows_ * width),
        second_inputs_(second_grads_ + rows_ * second_.sums_row()),
        shared_sums_(second_inputs_ + rows_ * second_.input_row()),
        sums_(shared_sums_ + job.team.rank * sums_size(job.shape, rows_)),
        optioned_(job.options.any() || job.peephole),
        carries_h_(Cell::carries_h || optioned_),
        view_(job.options, job.batch, job.shape, job.team,
              shared_sums_ + job.team.size * sums_size(job.shape, rows_)),
        options_(job.options),
        seen_(shared_sums_ + job.team.size * sums_size(job.shape, rows_) +
              StepView<S>::scratch(job.shape, job.batch)),
        inputs_(seen_ + (sees_other_states() ? rows_ * panels_.R : 0)),
        x_grads_(inputs_ + (options_.mask.data ? rows_ * panels_.I : 0)),
        h_grads_(x_grads_ + panels_.count() * rows_ * Cell::x_count * p),
        shares_(h_grads_ + panels_.count() * rows_ * Cell::h_count * p) {}

  // Whether what W_hh is multiplied by is not always y of the step before.
  bool sees_other_states() const { return options_.resets.data || options_.recurrent_mask; }

  // Of one panel of output columns; of all, where the products are made of parts.
  static Index sums_size(const LayerShape& s, Index rows) {
    const Index most = s.input_size > s.output_size() ? s.input_size : s.output_size();
    return (s.options.parts > 0 ? Panels<S, Cell>::reverse_panels(most) : 1) * rows * 4 * p;
  }

  static Index second_offset(const Panels<S, Cell>& panels) {
    return panels.reverse_size(panels.R, h_range<Cell>);
  }
  static Index x_offset(const LayerShape& s) {
    return second_offset(Panels<S, Cell>(s)) + SecondProduct<S, Cell>(s).reverse_size();
  }

  void run() {
    const Team& team = job_.team;
    const auto grads_at = [this](Index j, Index row) { return grads(j, row); };
    parts_.begin();
    for (Index t = job_.steps - 1; t >= 0; --t) {
      if (optioned_) view_.begin_reverse(t);
      step(t);
      if constexpr (Cell::second != Second::none) {
        if (second_.exists) {
          team.wait();
          second_step(t);
        }
      }
      parts_.split_grads(t, grads_at);
      team.wait();
      if constexpr (normalised) norm_step(t);
    }
    finish_state();
    if (optioned_ && job_.weights) prepare_weight_gradients();
    if (job_.weights) split_inputs();
    const Index n = job_.weights ? panels_.count() : 0;
    const Index end = team.end(n), group = parts_.used() ? parts_.group() : 1;
    for (Index j = team.begin(n); j < end; j += group) {
      weight_gradients(j, end - j < group ? end - j : group);
    }
    if constexpr (Cell::second != Second::none) {
      const Index m = job_.weights ? second_.count() : 0;
      for (Index j = team.begin(m); j < team.end(m); ++j) second_gradient(j);
    }
    if (job_.grad_x.data) input_gradient();
    parts_.end();
    team.wait();
  }

  // The gate gradients of step t and on, rows of time x batch, of panel j.
  S* grads(Index j, Index row) const { return grads_ + (j * rows_ + row) * width; }
  S* second_grads(Index j, Index row) const { return second_grads_ + (j * rows_ + row) * 4 * p; }
  // What the second product took, again.
  S* second_input(Index row, Index first) const {
    return second_inputs_ + row * second_.input_row() + first;
  }

  // Gradients of sums in panels of `rows_` rows: of a row in panel j the `step` values at
  // data + (j * rows_ + row) * width, fewer in the last panel.
  struct Factor {
    const S* data;
    Index width;
    Index panels;
    Index step;
    Index last;
    PartsOf parts;
    Index rows() const { return (panels - 1) * step + last; }  // of the packed weights
    const S* at(Index j, Index row, Index rows) const { return data + (j * rows + row) * width; }
    // The packed weights that a panel of output columns has for all of them.
    const S* weights(const S* packed, Index panel) const { return packed + panel * 4 * p * rows(); }
  };
  // The gradients of the sums of a product: packets of the range of the gate gradients, or, where
  // the product is normalised, its own.
  Factor gates(Range range) const {
    const Index J = panels_.count(), step = (Cell::wide ? 4 : range.count) * p;
    if (normalised) {
      return {range.recurrent ? h_grads_ : x_grads_, step, J, step, step, PartsOf::none};
    }
    return {grads_ + range.first * p,
            width,
            J,
            step,
            panels_.packets(J - 1, range) * p,
            range.recurrent ? PartsOf::h : PartsOf::x};
  }
  Factor second_sums() const {
    const Index J = second_.count();
    return {second_grads_, 4 * p, J, 4 * p, second_.panels.packets(J - 1) * p, PartsOf::none};
  }

  static constexpr auto nothing_wanted = [](auto&&, Index, Index, Index) {};

  // For every panel of output columns, from the last to the first where a step turns back, and tile
  // of rows: rows of `carry`, null: zeros, and rows [row, row + n) of the factor times the weights;
  // then end(sums, R, row, Q, panel). Without the product if weights is null. wants(fetches, row,
  // Q, panel) says what `end` is going to read.
  template <class End, class Wants = decltype(nothing_wanted)>
  FASTBPTT_INLINE void product(const Factor& factor, bool split, Index row, Index n,
                               const S* weights, Index columns, const S* carry, End&& end,
                               const Wants& wants = nothing_wanted) const {
    const Index J = factor.panels, step = factor.step;
    const Index panels = Panels<S, Cell>::reverse_panels(columns);
    const Index from = job_.team.begin(panels), to = job_.team.end(panels);
    const Index bytes = factor.rows() * columns * Index(sizeof(S));
    const bool turns = turns_back(n, tile_rows(4), bytes) || Parts::are_large(job_.shape);
    const bool back = split && turns && row / n % 2 == 1;
    const bool in_parts = weights && parts_.used() && factor.parts != PartsOf::none;
    if (in_parts) product_in_parts(factor.parts, back, row, n, columns, carry, end);
    for (Index k = from; k < to; ++k) {
      const Index panel = back ? from + to - 1 - k : k;
      const Index Q = Panels<S, Cell>::reverse_packets(columns, panel);
      const S* const w = weights ? factor.weights(weights, panel) : nullptr;
      const S* const next = w && back ? factor.weights(weights, panel - 1) : nullptr;
      // Gradient panels whose weights stay in the first caches over all rows.
      const Index fit = panel_bytes / (Index(sizeof(S)) * 4 * p * step);
      const Index most = fit > 0 ? fit : 1;
      const bool whole = J <= most + most / 2 || n <= tile_rows(Q) || !w;
      const Index passes = whole ? 1 : ceil_div(J, most);
      const auto plain = [&](Index first, Index rows) {
        for (Index i = 0; i < passes; ++i) {
          const Index begin = J * i / passes, stop = J * (i + 1) / passes;
          for_row_tiles(rows, Q, [&](Index R, Index tile_row) {
            const Index at = first + tile_row;
            S* const sums = sums_ + at * 4 * p;
            RowFetches soon;
            if (i == passes - 1) {
              R > 1 ? wants(soon, at, Q, panel) : wants(FetchNow{}, at, Q, panel);
            }
            if (i == 0) start(sums, R, at, Q, panel, columns, carry);
            if (w) {
              multiply_grads(factor, split, R, Q, sums, row + at, begin, stop, w, at,
                             i == passes - 1 ? next : nullptr, soon);
            } else {
              soon.fetch(0, R);
            }
            if (i == passes - 1) end(sums, R, at, Q, panel);
          });
        }
      };
      if (!in_parts) plain(0, n);
      for (Index first = 0; in_parts && first < n; first += job_.batch) {
        if (parts_.fits(factor.parts, (row + first) / job_.batch)) continue;
        parts_.need_plain([&] { pack_plain(job_.shape, job_.plain, const_cast<S*>(job_.packed)); });
        plain(first, job_.batch);
      }
    }
  }

  // The same for the steps whose products are made of parts: the gate gradients in pieces that stay
  // in the second cache, as all panels meet a piece before the next. What ends a single step, its
  // cells, goes row by row, as what they read lies in memory.
  template <class End>
  FASTBPTT_INLINE void product_in_parts(PartsOf which, bool back, Index row, Index n, Index columns,
                                        const S* carry, End&& end) const {
    alignas(64) static constexpr S zero[4 * p] = {};
    const Index B = job_.batch, panels = Panels<S, Cell>::reverse_panels(columns);
    const Index from = job_.team.begin(panels), to = job_.team.end(panels);
    const Index depth = parts_.depth(which), piece = parts_.depth_at_once(which, n);
    for (Index k = 0; k < depth; k += piece) {
      const Index stop = k + piece < depth ? k + piece : depth;
      for (Index i = from; i < to; ++i) {
        const Index panel = back ? from + to - 1 - i : i;
        const Index Q = Panels<S, Cell>::reverse_packets(columns, panel);
        for (Index first = 0; first < n; first += B) {
          const Index t = (row + first) / B;
          if (!parts_.fits(which, t)) continue;
          S* const sums = sums_ + ((panel - from) * n + first) * 4 * p;
          if (k == 0 && carry) start(sums, B, first, Q, panel, columns, carry);
          parts_.multiply(which, t, panel, Q, sums, k == 0 && !carry ? zero : nullptr, k, stop);
          if (stop == depth && n > B) end(sums, B, first, Q, panel);
        }
      }
    }
    if (n > B || !parts_.fits(which, row / B)) return;
    for (Index b = 0; b < B; ++b) {
      for (Index panel = from; panel < to; ++panel) {
        const Index Q = Panels<S, Cell>::reverse_packets(columns, panel);
        end(sums_ + ((panel - from) * B + b) * 4 * p, 1, b, Q, panel);
      }
    }
  }

  static void start(S* sums, Index R, Index row, Index Q, Index panel, Index columns,
                    const S* carry) {
    for (Index r = 0; r < R; ++r, sums += 4 * p) {
      for (Index q = 0; q < Q; ++q) {
        const Index first = (panel * 4 + q) * p;
        store(sums + q * p, carry ? load(carry + (row + r) * columns + first,
                                         Panels<S, Cell>::valid(columns, first))
                                  : constant<S>(0));
      }
    }
  }

  void multiply_grads(const Factor& factor, bool split, Index R, Index Q, S* sums, Index row,
                      Index begin, Index stop, const S* weights, Index at, const S* next,
                      const RowFetches& soon) const {
    const Index step = factor.step;
    // The last panel of four packets may be shorter.
    const Index last = factor.panels - 1;
    const Index even = stop - 1 == last && factor.last < step ? last : stop;
    RowsProduct<S> product(sums, 4 * p, step, weights + begin * step * Q * p, even - begin,
                           rows_ * factor.width);
    for (Index r = 0; r < R; ++r) product.a[r] = factor.at(begin, row + r, rows_);
    if (even < stop) {
      product.K_behind = factor.last;
      product.panel_behind = weights + last * step * Q * p;
      for (Index r = 0; r < R; ++r) product.behind[r] = factor.at(last, row + r, rows_);
    }
    product.fetch_next(Q, R, at, next);
    // One row before each block, and what is left before the first.
    soon.fetch(0, 1);
    soon.fetch(product.blocks < 1 ? 1 : product.blocks, R);
    product.soon = &soon;
    multiply_rows(R, Q, split, product);
  }

  template <bool whole = false>
  FASTBPTT_INLINE ReverseUnit<S> unit(Index t, Index b, Index block) const {
    const Index first = block * p, H = panels_.H;
    const bool initial = t == 0 && job_.first;
    ReverseUnit<S> u;
    u.n = whole ? p : panels_.units(first);
    if (second_.projects()) {
      u.output = second_input(t * job_.batch + b, first);
    } else {
      u.h_before = h_before(t, b) + first;
      u.h = job_.y.at(t, b) + first;
      u.carry_h = job_.grad_state.h + b * H + first;
    }
    u.grads = grads(Cell::wide ? block / 4 : block, t * job_.batch + b) +
              (Cell::wide ? block % 4 * p : 0);
    if constexpr (Cell::tape > 0) u.tape = tape_unit(job_.tape, t, b, first * Cell::tape);
    if constexpr (Cell::has_c) {
      constexpr Index c = Cell::tape - 1;
      u.c = u.tape.run(c, u.n);
      u.carry_c = job_.grad_state.c + b * H + first;
      const bool narrow = job_.tape.narrow.data;
      if (optioned_ && view_.resets(t, b)) {
        u.c_before = {(options_.restart.c ? options_.restart.c : zeros_) + first, nullptr, narrow};
      } else if (!initial) {
        u.c_before = tape_unit(job_.tape, t - 1, b, first * Cell::tape).run(c, u.n);
      } else {
        u.c_before = {(job_.initial.c ? job_.initial.c + b * H : zeros_) + first, nullptr, narrow};
      }
      if (job_.peephole) {
        u.peephole = {job_.peephole + first, H};
        if (job_.weights) u.grad_peephole = {job_.scratch + zeros(job_.shape) + H + first, H};
      }
    }
    return u;
  }

  // h' as the cell took it.
  const S* h_before(Index t, Index b) const {
    if (optioned_ && view_.resets(t, b)) return options_.restart.h ? options_.restart.h : zeros_;
    if (t > 0 || !job_.first) return job_.y.at(t - 1, b);
    return job_.initial.h ? job_.initial.h + b * panels_.R : zeros_;
  }

  // What the cells of the rows from b on read of a panel's units.
  template <class To>
  FASTBPTT_INLINE void add_units(Index t, Index b, Index Q, Index panel, To&& soon) const {
    const Index first = panel * 4 * p, before = t > 0 ? t - 1 : 0;
    const Sequence<const S>& y = job_.y;
    if (job_.grad_y.data) soon.add(values_of(job_.grad_y, t, b, first, Q * p));
    if (second_.projects()) return;
    soon.add(values_of(y.at(Cell::carries_h ? before : t, b) + first, y.row, Q * p));
    if (job_.tape.wide.data) {
      add_tape(job_.tape.wide, t, b, first, Q, soon);
    } else {
      add_tape(job_.tape.narrow, t, b, first, Q, soon);
    }
  }
  template <class T, class To>
  FASTBPTT_INLINE void add_tape(const Sequence<T>& tape, Index t, Index b, Index first, Index Q,
                                To&& soon) const {
    if (Cell::tape == 0 || !tape.data) return;
    soon.add(values_of(tape.at(t, b) + first * Cell::tape, tape.row, Q * p * Cell::tape));
    if (Cell::has_c && t > 0) soon.add(cells_of(tape, t - 1, b, first, Q));
  }
  // Of a tape only c, the last run of each packet.
  template <class T>
  FASTBPTT_INLINE static RowFetch cells_of(const Sequence<T>& tape, Index t, Index b, Index first,
                                           Index Q) {
    constexpr Index size = Index(sizeof(T));
    const T* const c = tape.at(t, b) + (first + p) * Cell::tape - p;
    return {reinterpret_cast<const char*>(c), tape.row * size, Q, p * Cell::tape * size, nullptr};
  }
  // Row by row, c of the step before is all that the processor does not see coming.
  FASTBPTT_INLINE void fetch_cells(Index t, Index b, Index Q, Index panel) const {
    const auto& [wide, narrow] = job_.tape;
    if (!Cell::has_c || t < 0 || b >= job_.batch) return;
    if (wide.data) cells_of(wide, t, b, panel * 4 * p, Q).fetch(0);
    if (narrow.data) cells_of(narrow, t, b, panel * 4 * p, Q).fetch(0);
  }
  static constexpr Index rows_ahead = 2;

  void step(Index t) {
    const Index B = job_.batch, K = panels_.R;
    const bool last = t == job_.steps - 1;  // then grad_state holds all that comes back
    product(
        gates(h_range<Cell>), true, (t + 1) * B, B, last ? nullptr : job_.packed, K,
        last ? job_.grad_state.h : carry(),
        [&](S* sums, Index R, Index b, Index Q, Index panel) {
          for (Index r = 0; r < R; ++r) {
            if (parts_.used()) fetch_cells(t - 1, b + r + rows_ahead, Q, panel);
            if (optioned_) {
              step_optioned(t, b + r, Q, panel, sums + r * 4 * p);
            } else if ((panel * 4 + Q) * p <= K) {
              step_row<true>(t, b + r, Q, panel, sums + r * 4 * p);
            } else {
              step_apart(t, b + r, Q, panel, sums + r * 4 * p);
            }
          }
        },
        // Inlined: what only fetches would look to the compiler as if it did nothing.
        [&](auto&& soon, Index b, Index Q, Index panel)
            __attribute__((always_inline)) { add_units(t, b, Q, panel, soon); });
  }

  // The cells of a row; if `whole`, all packets are full, and no load asks how much it may read.
  template <bool whole>
  FASTBPTT_INLINE void step_row(Index t, Index b, Index Q, Index panel, const S* sums) const {
    const S* const grad_y = job_.grad_y.data ? job_.grad_y.at(t, b) : nullptr;
    for (Index q = 0; q < Q; ++q) {
      const Index first = (panel * 4 + q) * p, row = t * job_.batch + b;
      // The step's own error comes last, as it does where time is cut before the step.
      Packet<S> grad_h = load(sums + q * p);
      if (grad_y) {
        const Index n = whole ? p : panels_.valid(panels_.R, first);
        grad_h = padd(grad_h, load(grad_y + first, n));
      }
      if (second_.projects()) {
        store(second_grads(panel, row) + q * p, grad_h);
      } else if constexpr (normalised) {
        store(norm_grad_h(b) + first, grad_h);
      } else if constexpr (Cell::second == Second::candidate) {
        Cell::backward_candidate(grad_h, unit<whole>(t, b, panel * 4 + q),
                                 second_grads(panel, row) + q * p, second_input(row, first));
      } else {
        Cell::backward(grad_h, unit<whole>(t, b, panel * 4 + q));
      }
    }
  }
  __attribute__((noinline)) void step_apart(Index t, Index b, Index Q, Index panel,
                                            const S* sums) const {
    step_row<false>(t, b, Q, panel, sums);
  }

  // The same with options. What comes back to a row has not gone through the options of the step
  // behind it yet, but for the last step, where finish_state did that.
  __attribute__((noinline)) void step_optioned(Index t, Index b, Index Q, Index panel,
                                               S* sums) const {
    using Optioned = OptionedCell<S, Cell>;
    if (t < job_.steps - 1) came_back(t + 1, b, Q, panel, sums);
    const S* const grad_y = job_.grad_y.data ? job_.grad_y.at(t, b) : nullptr;
    for (Index q = 0; q < Q; ++q) {
      const Index first = (panel * 4 + q) * p, row = t * job_.batch + b;
      const Index n = panels_.valid(panels_.R, first);
      Packet<S> grad_h = load(sums + q * p);
      if (grad_y) grad_h = padd(grad_h, load(grad_y + first, n));
      if (second_.projects()) {
        const S* const keep = view_.keep_h(b, first);
        const Packet<S> past = view_.missing(t, b) ? grad_h
                               : keep              ? pmul(load(keep, n), grad_h)
                                                   : constant<S>(0);
        store(second_grads(panel, row) + q * p, psub(grad_h, past));
        store(job_.grad_state.h + b * panels_.R + first, past, n);
        continue;
      }
      if constexpr (normalised) {
        store(norm_grad_h(b) + first, grad_h);
        continue;
      }
      const ReverseUnit<S> u = unit(t, b, panel * 4 + q);
      if constexpr (Cell::second == Second::candidate) {
        Optioned::backward_candidate(grad_h, u, second_grads(panel, row) + q * p,
                                     second_input(row, first), view_.unit(t, b, first));
      } else {
        Optioned::backward(grad_h, u, view_.unit(t, b, first));
      }
      restart_cells(t, b, u, first);
    }
  }

  // What has come back to c' goes to the learned state where the row begins anew.
  void restart_cells(Index t, Index b, const ReverseUnit<S>& u, Index first) const {
    if constexpr (Cell::has_c) {
      if (!view_.resets(t, b)) return;
      restart_gradient(options_.grad_restart.c, first, load(u.carry_c, u.n), u.n);
      store(u.carry_c, constant<S>(0), u.n);
    }
  }

  // dL/dh of a row of the step in work, whole packets.
  S* norm_grad_h(Index b) const {
    const Index J = panels_.count();
    return shares_ + J * (rows_ * NormRows<S, Cell>::shares(job_.shape) + b) * p;
  }

  // The cells of a step with layer normalisation, row after row. What rows have in common comes
  // behind them, panel after panel, so that the order of the sums is that of one thread.
  void norm_step(Index t) {
    const Team& team = job_.team;
    const Index B = job_.batch;
    for (Index b = team.begin(B); b < team.end(B); ++b) norm_row(t, b);
    team.wait();
    if (!Cell::has_c || !optioned_ || !view_.any_reset(t)) return;
    for (Index j = team.begin(panels_.count()); j < team.end(panels_.count()); ++j) {
      for (Index b = 0; b < B; ++b) restart_cells(t, b, unit(t, b, j), j * p);
    }
    team.wait();
  }

  __attribute__((noinline)) void norm_row(Index t, Index b) const {
    using Rows = NormRows<S, Cell>;
    const Index at = t * job_.batch + b, shares = Rows::shares(job_.shape);
    const auto unit_of = [&](Index j) { return unit(t, b, j); };
    const auto option_of = [&](Index j) {
      return optioned_ ? view_.unit(t, b, j * p) : OptionUnit<S>{};
    };
    const NormReverseRow<S> row{
        job_.packed + norm_offset(job_.shape),
        norm_grad_h(b),
        job_.tape.wide.at(t, b) + Cell::tape * panels_.H,
        x_grads_ + at * Cell::x_count * p,
        rows_ * Cell::x_count * p,
        h_grads_ + at * Cell::h_count * p,
        rows_ * Cell::h_count * p,
        shares_ + at * shares * p,
        rows_ * shares * p,
        shares,
        norm_grad_h(job_.batch) + job_.team.rank * Rows::reverse_spare(job_.shape)};
    if (view_.missing(t, b)) return Rows::skip_backward(panels_, row, unit_of, option_of);
    Rows::backward(panels_, row, optioned_, unit_of, option_of);
  }

  // dL/dh before step t of row b: the sums, as the product of its gate gradients left them, become
  // what reaches the step before.
  void came_back(Index t, Index b, Index Q, Index panel, S* sums) const {
    const S* const carry = job_.grad_state.h + b * panels_.R;
    for (Index q = 0; q < Q; ++q) {
      const Index first = (panel * 4 + q) * p, n = panels_.valid(panels_.R, first);
      Packet<S> sum = load(sums + q * p);
      if (options_.recurrent_mask) {
        const S* const mask = options_.recurrent_mask + b * panels_.R;
        sum = pmadd(load(mask + first, n), sum, load(carry + first, n));
      }
      if (view_.resets(t, b)) {
        restart_gradient(options_.grad_restart.h, first, sum, n);
        sum = constant<S>(0);
      }
      store(sums + q * p, sum);
    }
  }
  // With recurrent dropout the product comes first, as the carry is not multiplied.
  const S* carry() const {
    return carries_h_ && !options_.recurrent_mask ? job_.grad_state.h : nullptr;
  }

  static void restart_gradient(S* to, Index first, const Packet<S>& grad, Index n) {
    if (to) store(to + first, padd(load(to + first, n), grad), n);
  }

  // Back through the second product, and through what of the cell lies before it.
  void second_step(Index t) {
    product(second_sums(), true, t * job_.batch, job_.batch, job_.packed + second_offset(panels_),
            panels_.H, nullptr, [&](const S* sums, Index R, Index b, Index Q, Index panel) {
              for (Index r = 0; r < R; ++r)
                for (Index q = 0; q < Q; ++q) {
                  const Packet<S> grad = load(sums + (r * 4 + q) * p);
                  const ReverseUnit<S> u = unit(t, b + r, panel * 4 + q);
                  const Index first = (panel * 4 + q) * p;
                  if constexpr (normalised) {
                    store(norm_grad_h(b + r) + first, grad);
                  } else if constexpr (Cell::second == Second::projection) {
                    optioned_ ? projected_optioned(t, b + r, grad, u, first)
                              : Cell::backward(grad, u);
                  } else if (optioned_) {
                    OptionedCell<S, Cell>::backward_gates(grad, u, view_.unit(t, b + r, first));
                  } else {
                    Cell::backward_gates(grad, u);
                  }
                }
            });
  }

  __attribute__((noinline)) void projected_optioned(Index t, Index b, const Packet<S>& grad,
                                                    const ReverseUnit<S>& u, Index first) const {
    OptionedCell<S, Cell>::backward(grad, u, view_.unit(t, b, first));
    restart_cells(t, b, u, first);
  }

  // dL/dh before the first step of the run.
  void finish_state() {
    const Index K = panels_.R;
    product(gates(h_range<Cell>), true, 0, job_.batch, job_.packed, K, carry(),
            [&](S* sums, Index R, Index b, Index Q, Index panel) {
              for (Index r = 0; r < R; ++r) {
                if (optioned_) came_back(0, b + r, Q, panel, sums + r * 4 * p);
                write_row(sums + r * 4 * p, Q, panel, K, job_.grad_state.h + (b + r) * K);
              }
            });
  }

  void input_gradient() {
    product(gates(x_range<Cell>), false, 0, rows_, job_.packed + x_offset(job_.shape), panels_.I,
            nullptr, [&](const S* sums, Index R, Index row, Index Q, Index panel) {
              Index t = row / job_.batch, b = row % job_.batch;
              for (Index r = 0; r < R; ++r) {
                if (parts_.used() && b + rows_ahead < job_.batch) {
                  fetch(job_.grad_x.at(t, b + rows_ahead) + panel * 4 * p, Q * p);
                }
                write_row(sums + r * 4 * p, Q, panel, panels_.I, job_.grad_x.at(t, b));
                if (++b == job_.batch) b = 0, ++t;
              }
            });
  }

  static void write_row(const S* sums, Index Q, Index panel, Index columns, S* row) {
    for (Index q = 0; q < Q; ++q) {
      const Index first = (panel * 4 + q) * p;
      store(row + first, load(sums + q * p), Panels<S, Cell>::valid(columns, first));
    }
  }

  // What the weights were multiplied by, where that is not what x and y hold.
  __attribute__((noinline)) void prepare_weight_gradients() {
    const Team& team = job_.team;
    for (Index row = team.begin(rows_); row < team.end(rows_); ++row) {
      const Index t = row / job_.batch, b = row % job_.batch;
      if (sees_other_states()) view_.see(b, h_before(t, b), seen_ + row * panels_.R);
      // A step that is missing may hold anything, and zero times that is not always zero.
      if (!options_.mask.data) continue;
      const S* const x = job_.x.at(t, b);
      for (Index i = 0; i < panels_.I; ++i) {
        inputs_[row * panels_.I + i] = view_.missing(t, b) ? S(0) : x[i];
      }
    }
    team.wait();
  }

  // Of n panels.
  void weight_gradients(Index first, Index n) {
    for (Index j = first; j < first + n; ++j) {
      if (job_.fresh) {
        S* const sums = panels_.bias(job_.scratch, j);
        for (Index i = 0; i < panels_.panel_size(); ++i) sums[i] = S(0);
      }
      bias_gradient(j);
      if (parts_.used()) {
        parts_.split_panel(j - first, j,
                           [this](Index panel, Index row) { return grads(panel, row); });
        continue;
      }
      x_gradient(j, 0, job_.steps);
      h_gradient(j, 0, job_.steps);
    }
    if (!parts_.used()) return;
    parts_.add_gradients(
        first, n, [&](Index j) { return panels_.x(job_.scratch, j); },
        [&](Index j) { return panels_.h(job_.scratch, j); },
        [&](Index j, Index begin, Index end) { x_gradient(j, begin, end); },
        [&](Index j, Index begin, Index end) { h_gradient(j, begin, end); });
  }

  void x_gradient(Index j, Index begin, Index end) {
    const Index B = job_.batch, I = panels_.I;
    const Sequence<const S> x = options_.mask.data ? Sequence<const S>{inputs_, B * I, I} : job_.x;
    outer(x_range<Cell>, j, x, begin, end, 0, I, panels_.x(job_.scratch, j));
  }
  // Step t meets y of the step before; the first of all meets the initial state.
  void h_gradient(Index j, Index begin, Index end) {
    const Index B = job_.batch, K = panels_.R;
    const Index from = begin == 0 && job_.first ? 1 : begin;
    S* const to = panels_.h(job_.scratch, j);
    if (sees_other_states()) {
      outer(h_range<Cell>, j, {seen_, B * K, K}, begin, end, 0, K, to);
    } else {
      outer(h_range<Cell>, j, job_.y, from - 1, end - 1, 1, K, to);
      if (from > begin && job_.initial.h) {
        outer(h_range<Cell>, j, {job_.initial.h, 0, K}, 0, 1, 0, K, to);
      }
    }
  }

  // What the weights were multiplied by, as parts.
  void split_inputs() {
    parts_.split_inputs(
        [this](Index t, Index b) {
          return options_.mask.data ? inputs_ + (t * job_.batch + b) * panels_.I : job_.x.at(t, b);
        },
        [this](Index t, Index b) {
          return sees_other_states() ? seen_ + (t * job_.batch + b) * panels_.R : h_before(t, b);
        });
  }
  void second_gradient(Index j) {
    const Index B = job_.batch, Q = second_.panels.packets(j), row = second_.input_row();
    S* const to = second_.panels.x(job_.scratch + panels_.size(), j);
    for (Index i = 0; job_.fresh && i < second_.panels.I * Q * p; ++i) to[i] = S(0);
    outer(second_grads(j, 0), 4 * p, Q, {second_inputs_, B * row, row}, 0, job_.steps, 0,
          second_.panels.I, to);
  }

  void bias_gradient(Index j) {
    S* const to = panels_.bias(job_.scratch, j);
    if constexpr (normalised) {
      S* const vectors = job_.scratch + norm_gradient(job_.shape);
      const Index shares = NormRows<S, Cell>::shares(job_.shape);
      return NormRows<S, Cell>::gather(
          panels_.units(j * p), rows_, grads(j, 0), shares_ + j * rows_ * shares * p, shares,
          [&](Index row) {
            return tape_unit(job_.tape, row / job_.batch, row % job_.batch, j * p * Cell::tape);
          },
          NormVectors<S, Cell>::gain_x(vectors, j), to, panels_.H,
          job_.scratch + zeros(job_.shape) + panels_.H + j * p);
    }
    // Side by side, as one sum waits for the latency of each addition.
    with_constant<Cell::packets>(panels_.packets(j), [&](auto Q) {
      Packet<S> sums[Q];
      for (int q = 0; q < Q; ++q) sums[q] = load(to + q * p);
      for (Index row = rows_ - 1; row >= 0; --row) {
        const S* const from = grads(j, row);
        for (int q = 0; q < Q; ++q) sums[q] = padd(sums[q], load(from + q * p));
      }
      for (int q = 0; q < Q; ++q) store(to + q * p, sums[q]);
    });
  }

  void outer(Range range, Index j, const Sequence<const S>& a, Index begin, Index end, Index shift,
             Index columns, S* to) {
    const Factor factor = gates(range);
    outer(factor.at(j, 0, rows_), factor.width, panels_.packets(j, range), a, begin, end, shift,
          columns, to);
  }

  // The weight gradients of so many columns stay in L1, and with them the pieces of so many rows of
  // the inputs, while the gate gradients of these rows stream by.
  static constexpr Index columns_at_once = 48, rows_at_once = 128;

  // to[i][q] += sum over t in [begin, end) and b, from the last to the first, of
  // a(t, b)[i] * gradient(t + shift, b)[q], a panel of gradients whose rows are `step` apart.
  void outer(const S* gradient, Index step, Index Q, const Sequence<const S>& a, Index begin,
             Index end, Index shift, Index columns, S* to) {
    if (end <= begin) return;
    const Index B = job_.batch;
    // Where all rows lie at one stride they are one sum; else it goes step by step.
    const bool even = B == 1 || a.step == B * a.row;
    const Index runs = even ? 1 : end - begin, K = even ? (end - begin) * B : B;
    const Index most = rows_at_once > K ? rows_at_once / K : 1;  // runs at once
    ColumnsProduct<S> product{};
    product.a_row = B == 1 ? -a.step : -a.row;
    product.a_run = -a.step;
    product.panel_row = -step;
    product.panel_run = -B * step;
    const S* const last = a.at(end - 1, B - 1);
    const S* const last_gradient = gradient + ((end - 1 + shift) * B + B - 1) * step;
    for (Index first = 0, n; first < columns; first += n) {
      // Not so few behind the last group that they would be a group of their own.
      n = columns - first < columns_at_once * 4 / 3 ? columns - first : columns_at_once;
      for (Index run = 0; run < runs; run += most) {
        product.runs = runs - run < most ? runs - run : most;
        for (Index k = 0; k < K; k += product.K) {
          product.K = K - k < rows_at_once ? K - k : rows_at_once;
          product.panel = last_gradient + run * product.panel_run + k * product.panel_row;
          for_row_tiles(n, Q, [&](Index R, Index i) {
            product.sums = to + (first + i) * Q * p;
            product.a = last + run * product.a_run + k * product.a_row + first + i;
            multiply_columns(R, Q, product);
          });
        }
      }
    }
  }

  const ReverseJob<S>& job_;
  const Panels<S, Cell> panels_;
  const SecondProduct<S, Cell> second_;
  const Index rows_;
  const S* const zeros_;  // [H]
  Parts parts_;
  S* const grads_;          // gate gradients [panels][steps * B][width]
  S* const second_grads_;   // of the sums of the second product [panels][steps * B][4 p]
  S* const second_inputs_;  // what it took [steps * B][input_row]
  S* const shared_sums_;
  S* const sums_;  // [rows][4 p], of this thread's output panel in work
  const bool optioned_;
  const bool carries_h_;
  StepView<S> view_;
  const StepOptions<S>& options_;
  S* const seen_;     // h' as the products saw it [steps * B][R]
  S* const inputs_;   // x without what is missing [steps * B][I]
  S* const x_grads_;  // with layer normalisation, as norm_scratch says
  S* const h_grads_;
  S* const shares_;
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
