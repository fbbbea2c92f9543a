// One layer forward through a run of steps: for each step and panel the product, the cell and the
// tape in one pass, tile by tile of rows, so that the sums of the gates never leave the first
// cache.
#pragma once
#include "cells/optioned.h"
#include "kernels/direct_product.h"
#include "kernels/forward_parts.h"
#include "kernels/layer_norm.h"
#include "kernels/micro_kernel.h"
#include "kernels/panels.h"
#include "kernels/second_product.h"
#include "kernels/step_options.h"
#include "memory/caches.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// The tape of step t and row b, from element `first` on.
template <class S>
FASTBPTT_INLINE TapeUnit<S> tape_unit(const Tape<S>& tape, Index t, Index b, Index first) {
  return {tape.wide.data ? tape.wide.at(t, b) + first : nullptr,
          tape.narrow.data ? tape.narrow.at(t, b) + first : nullptr};
}

template <class S, class Cell>
class ForwardLayer {
  static constexpr Index p = lanes<S>;
  static constexpr int packets = Cell::packets;
  static constexpr Index width = packets * p;
  using Parts = ForwardParts<S, Cell>;

 public:
  static Index scratch(const LayerShape& s, Index steps, Index batch, int team) {
    const Panels<S, Cell> panels(s);
    // Of several parts some may have fewer rows than others.
    const Index rows = x_goes_ahead(s, panels, batch) || batch < few_rows ? batch : few_rows;
    const Index ahead = panels.count() * steps * rows * width;
    const SecondProduct<S, Cell> second(s);
    const Index behind = batch * (second.input_row() + second.sums_row());
    const Index z = Cell::second == Second::candidate ? batch * s.hidden_size : 0;
    return Parts::scratch(s, steps, batch, team) + ahead + team * batch * width + behind + z +
           StepView<S>::scratch(s, batch) + norm_scratch(s, batch, team);
  }
  static Index packed(const LayerShape& s) {
    return norm_offset(s) + norm_vectors(s) + Parts::packed(s);
  }
  static void pack(const LayerShape& s, const Weights<const S>& w, S* to) {
    const Panels<S, Cell> panels(s);
    panels.pack_bias(w, to);
    if (s.options.parts == 0) panels.pack_forward(w, to);
    SecondProduct<S, Cell>(s).pack(w, to + panels.size());
    if constexpr (normalised) NormVectors<S, Cell>(s).pack(w, to + norm_offset(s));
    Parts::pack(s, w, to + norm_offset(s));
  }

  static void run(const ForwardJob<S>& job) { ForwardLayer(job).run(); }

 private:
  explicit ForwardLayer(const ForwardJob<S>& job)
      : job_(job),
        panels_(job.shape),
        second_(job.shape),
        ahead_((job.packed || normalised) && x_goes_ahead(job.shape, panels_, job.batch)),
        turns_(turns_back(job.batch, few_rows, step_bytes()) || Parts::are_large(job.shape)),
        parts_(job, panels_, job.packed ? job.packed + norm_offset(job.shape) : nullptr,
               job.scratch),
        sums_of_x_(job.scratch + Parts::scratch(job.shape, job.steps, job.batch, job.team.size)),
        shared_sums_(sums_of_x_ + (ahead_ ? panels_.count() * job.steps * job.batch * width : 0)),
        sums_(shared_sums_ + job.team.rank * job.batch * width),
        second_sums_(shared_sums_ + job.team.size * job.batch * width),
        inputs_(second_sums_ + job.batch * second_.sums_row()),
        z_(inputs_ + job.batch * second_.input_row()),
        view_scratch_(z_ + (Cell::second == Second::candidate ? job.batch * panels_.H : 0)),
        norm_(view_scratch_ + StepView<S>::scratch(job.shape, job.batch)),
        optioned_(job.options.any() || job.weights.peephole),
        view_(job.options, job.batch, job.shape, job.team, view_scratch_) {}

  // Layer normalisation: the vectors where nothing is packed, then the sums of the recurrent
  // product [panels][B][width], then what each thread keeps of a row.
  static constexpr bool normalised = is_normalised<Cell>;
  static Index norm_offset(const LayerShape& s) {
    return Panels<S, Cell>(s).size() + SecondProduct<S, Cell>(s).size();
  }
  static Index norm_vectors(const LayerShape& s) {
    if constexpr (normalised) return NormVectors<S, Cell>(s).size();
    return 0;
  }
  static Index norm_scratch(const LayerShape& s, Index batch, int team) {
    if constexpr (normalised) {
      return norm_vectors(s) + Panels<S, Cell>(s).count() * batch * width +
             team * NormRows<S, Cell>::forward_spare(s);
    }
    return 0;
  }
  S* sums_of_h(Index j) const { return norm_ + norm_vectors(job_.shape) + j * job_.batch * width; }

  // Whether the products of x and h' are of as many packets, those of h' `shift` further.
  static constexpr bool joins = !normalised && Cell::x_count == Cell::h_count;
  static constexpr int shift = Cell::h_first - Cell::x_first;
  static_assert(!joins || shift == 0 || (shift == 1 && Cell::x_count == 3), "no tile shifts so");

  static constexpr Index few_rows = tile_rows(Cell::h_count);
  // With so few rows that each panel serves a single tile, or weights that do not stay in L2 from
  // step to step, the input product runs ahead over all steps, where a panel serves more rows.
  // Normalised, it goes ahead always, even where nothing is packed.
  static bool x_goes_ahead(const LayerShape& s, const Panels<S, Cell>& panels, Index batch) {
    if (normalised || batch <= few_rows) return true;
    if (s.options.parts > 0) return Parts::x_goes_ahead(s);
    return panels.count() * panels.x_size() * Index(sizeof(S)) > second_cache;
  }

  // Bytes of the weights that a step reads.
  Index step_bytes() const {
    const Index panel = panels_.h_size() + (ahead_ ? 0 : panels_.x_size());
    return panels_.count() * panel * Index(sizeof(S));
  }
  bool goes_back(Index t) const { return turns_ && t % 2 == 1; }
  Index panel(Index t, Index i, Index begin, Index end) const {
    return goes_back(t) ? begin + end - 1 - i : i;
  }

  // Whether a step goes through `step_tile` or `advance_tile`.
  bool single_tile() const {
    return ahead_ && job_.packed && !normalised && !parts_.used() && job_.batch <= few_rows;
  }

  void run() {
    const Team& team = job_.team;
    const Index begin = team.begin(panels_.count()), end = team.end(panels_.count());
    const bool single = single_tile();
    parts_.begin();
    for (Index j = begin; ahead_ && j < end; ++j) {
      job_.packed ? multiply_x_ahead(j) : multiply_x_directly(j);
    }
    if constexpr (normalised) {
      if (!job_.packed && team.rank == 0)
        NormVectors<S, Cell>(job_.shape).pack(job_.weights, norm_);
    }
    for (Index t = 0; t < job_.steps; ++t) {
      h_ = t == 0 ? Sequence<const S>{job_.state.h, 0, panels_.R}
                  : Sequence<const S>{job_.y.at(t - 1), 0, job_.y.row};
      before_ = h_;
      if (optioned_) {
        view_.begin_forward(t, h_, job_.state.c);
        before_ = view_.before();
        h_ = view_.seen();
      }
      parts_.begin_step(h_);
      for (Index i = begin; i < end && !single; ++i) {
        const Index j = panel(t, i, begin, end);
        if (parts_.used()) {
          step_panel_in_parts(t, j);
        } else if (job_.packed) {
          step_panel(t, j);
        } else {
          step_panel_directly(t, j);
        }
      }
      if (single) keeps_tape() ? step_tile(t, begin, end) : advance_tile(t, begin, end);
      team.wait();
      if constexpr (normalised) {
        for (Index b = team.begin(job_.batch); b < team.end(job_.batch); ++b) norm_row(t, b);
        team.wait();
      }
      if constexpr (Cell::second != Second::none) {
        if (!second_.exists) continue;
        const Index n = second_.count();
        for (Index j = team.begin(n); j < team.end(n); ++j) step_second(t, j);
        team.wait();
      }
    }
    const Sequence<S> last = job_.y.from(job_.steps - 1);
    for (Index b = 0; b < job_.batch && team.rank == 0; ++b) {
      for (Index i = 0; i < panels_.R; ++i) job_.state.h[b * panels_.R + i] = last.at(0, b)[i];
    }
    parts_.end();
    team.wait();
  }

  // Steps of the inner dimension whose part of a panel stays in the first caches over all rows.
  static constexpr Index columns_at_once() { return panel_bytes / (Index(sizeof(S)) * width); }

  S* ahead(Index j, Index row) const {
    return sums_of_x_ + (j * job_.steps * job_.batch + row) * width;
  }

  // Rows of sums start from the bias, but for those that are normalised before.
  void fill(S* sums, Index rows, Index j) const {
    const S* const bias = panels_.bias(job_.packed, j);
    for (Index q = 0; q < packets; ++q) {
      const Packet<S> value = normalised ? constant<S>(0) : load(bias + q * p);
      for (Index r = 0; r < rows; ++r) store(sums + r * width + q * p, value);
    }
  }

  void multiply_x_ahead(Index j) {
    const Index rows = job_.steps * job_.batch, I = panels_.I,
                Q = panels_.packets(j, x_range<Cell>);
    for (Index t = 0; parts_.used() && t < job_.steps; ++t) {
      start_with_x(t, j, ahead(j, t * job_.batch));
    }
    if (parts_.used()) return;
    fill(ahead(j, 0), rows, j);
    const Index passes = ceil_div(I, columns_at_once());
    for (Index i = 0; i < passes; ++i) {
      const Index begin = I * i / passes, end = I * (i + 1) / passes;
      const S* const next =
          i < passes - 1 ? nullptr : panels_.x(job_.packed, j) + panels_.panel_size();
      Index t = 0, b = 0;
      for_row_tiles(rows, Q, [&](Index R, Index row) {
        RowsProduct<S> product(ahead(j, row) + Cell::x_first * p, width, end - begin,
                               panels_.x(job_.packed, j) + begin * Q * p);
        product.fetch_next(Q, R, row, next);
        for (Index r = 0; r < R; ++r) {
          product.a[r] = job_.x.at(t, b) + begin;
          if (++b == job_.batch) b = 0, ++t;
        }
        multiply_rows(R, Q, false, product);
      });
    }
  }

  void multiply_x_directly(Index j) {
    const Index I = panels_.I;
    for (Index row = 0; row < job_.steps * job_.batch; ++row) {
      for (Index q = Cell::x_first; q < Cell::x_first + Cell::x_count; ++q) {
        const S* const w = job_.weights.w_ih + panels_.weight_row(j, q) * I;
        const Packet<S> sum = dots(w, panels_.units(panels_.unit(j, q)),
                                   job_.x.at(row / job_.batch, row % job_.batch), I);
        store(ahead(j, row) + q * p, sum);
      }
    }
  }

  // A step where all rows are a single tile. The product of h' is as fast as its panel is read, and
  // a cell is a chain of operations that wait for each other: in turn each would hold up the next.
  // So all panels are multiplied first, and then the cells run, one in the gaps of another.
  FASTBPTT_INLINE void step_tile(Index t, Index begin, Index end) {
    for (Index i = begin; i < end; ++i) multiply_tile(t, panel(t, i, begin, end));
    for (Index j = begin; j < end; ++j) finish_tile(t, j);
  }
  // Without a tape to write they are short enough to run in the gaps of the next panel's product.
  __attribute__((noinline)) void advance_tile(Index t, Index begin, Index end) {
    for (Index i = begin; i <= end; ++i) {
      if (i < end) multiply_tile(t, panel(t, i, begin, end));
      if (i > begin) finish_tile(t, panel(t, i - 1, begin, end));
    }
  }
  FASTBPTT_INLINE void finish_tile(Index t, Index j) const {
    for (Index b = 0; b < job_.batch; ++b) finish_row(t, j, b, ahead(j, t * job_.batch + b));
  }
  bool keeps_tape() const { return job_.tape.wide.data || job_.tape.narrow.data; }

  void multiply_tile(Index t, Index j) {
    RowsProduct<S> product(ahead(j, t * job_.batch) + Cell::h_first * p, width, panels_.R,
                           panels_.h(job_.packed, j));
    for (Index r = 0; r < job_.batch; ++r) product.a[r] = h_.at(0, r);
    multiply_rows(job_.batch, panels_.packets(j, h_range<Cell>), true, product);
  }

  void step_panel(Index t, Index j) {
    const Index B = job_.batch, I = panels_.I, K_h = panels_.R;
    const Index packets_of_tile = panels_.packets(j, x_range<Cell>);  // of h there are no more
    static_assert(Cell::h_count <= Cell::x_count, "tiles are those of x");
    const Index x_step = panels_.packets(j, x_range<Cell>) * p;
    const Index h_step = panels_.packets(j, h_range<Cell>) * p;
    S* const sums = normalised ? sums_of_h(j) : ahead_ ? ahead(j, t * B) : sums_;
    // Ranges of the inner dimension of so many steps.
    const Index most = columns_at_once();
    const bool whole = B <= few_rows || (ahead_ ? 0 : I) + K_h <= most + most / 2;
    // Both products of a tile in one call: its sums stay in registers, from the bias on.
    const bool joint = joins && whole && !ahead_;
    if (!joint && (!ahead_ || normalised)) fill(sums, B, j);
    const Index x_passes = ahead_ ? 0 : whole ? 1 : ceil_div(I, most);
    const Index h_passes = whole ? 1 : ceil_div(K_h, most);
    const auto pass = [&](Index R, Index row, const Sequence<const S>& a, Range range, Index begin,
                          Index end, const S* panel, const S* next = nullptr) {
      RowsProduct<S> product(sums + row * width + range.first * p, width, end - begin, panel);
      product.fetch_next(panels_.packets(j, range), R, row, next);
      for (Index r = 0; r < R; ++r) product.a[r] = a.at(0, row + r) + begin;
      multiply_rows(R, panels_.packets(j, range), true, product);
    };
    const S* const x_panel = panels_.x(job_.packed, j);
    const S* const h_panel = panels_.h(job_.packed, j);
    // What the last pass over a panel fetches: what is read first of the next.
    const S* const next = (ahead_ ? h_panel : x_panel) +
                          (goes_back(t) ? -panels_.panel_size() : panels_.panel_size());
    const Sequence<const S> x = job_.x.from(t);
    if (!whole) {
      for (Index i = 0; i < x_passes; ++i) {
        const Index begin = I * i / x_passes, end = I * (i + 1) / x_passes;
        for_row_tiles(B, packets_of_tile, [&](Index R, Index row) {
          pass(R, row, x, x_range<Cell>, begin, end, x_panel + begin * x_step);
        });
      }
      for (Index i = 0; i < h_passes - 1; ++i) {
        const Index begin = K_h * i / h_passes, end = K_h * (i + 1) / h_passes;
        for_row_tiles(B, packets_of_tile, [&](Index R, Index row) {
          pass(R, row, h_, h_range<Cell>, begin, end, h_panel + begin * h_step);
        });
      }
    }
    const Index begin = K_h * (h_passes - 1) / h_passes;
    const auto pass_both = [&](Index R, Index row) {
      RowsProduct<S> product(sums + row * width + Cell::x_first * p, width, I, x_panel);
      product.start = panels_.bias(job_.packed, j) + Cell::x_first * p;
      product.start_row = 0;
      product.K_behind = K_h;
      product.panel_behind = h_panel;
      product.fetch_next(packets_of_tile, R, row, next);
      for (Index r = 0; r < R; ++r) {
        product.a[r] = x.at(0, row + r);
        product.behind[r] = h_.at(0, row + r);
      }
      shift > 0 ? multiply_rows_shifted(R, product)
                : multiply_rows(R, packets_of_tile, true, product);
    };
    for_row_tiles(B, packets_of_tile, [&](Index R, Index row) {
      for (Index r = row; !normalised && r < row + R; ++r) fetch_tape(t, j, r);
      if (joint) {
        pass_both(R, row);
      } else {
        if (whole && !ahead_) pass(R, row, x, x_range<Cell>, 0, I, x_panel);
        pass(R, row, h_, h_range<Cell>, begin, K_h, h_panel + begin * h_step, next);
      }
      for (Index r = row; !normalised && r < row + R; ++r) {
        finish_row(t, j, r, sums + r * width);
      }
    });
  }

  // The tape that the cell of a row writes comes while the row is multiplied.
  FASTBPTT_INLINE void fetch_tape(Index t, Index j, Index b) const {
    if constexpr (Cell::tape > 0) {
      const Index first = panels_.unit(j, 0) * Cell::tape, n = p * Cell::tape;
      if (job_.tape.wide.data) fetch(job_.tape.wide.at(t, b) + first, n);
      if (job_.tape.narrow.data) fetch(job_.tape.narrow.at(t, b) + first, n);
    }
  }

  // The same with products of parts, as far as the step's values allow them.
  void step_panel_in_parts(Index t, Index j) {
    const Index B = job_.batch;
    S* const sums = ahead_ ? ahead(j, t * B) : sums_;
    if (!ahead_) start_with_x(t, j, sums);
    if (parts_.h_fits()) {
      parts_.multiply_h(j, sums + Cell::h_first * p, width);
    } else {
      add_rows(h_, h_range<Cell>, j, panels_.R, panels_.h(job_.packed, j), sums);
    }
    if (!optioned_ && panels_.whole(j)) return finish_rows(t, j, sums);
    for (Index b = 0; b < B; ++b) finish_apart(t, j, b, sums + b * width);
  }
  __attribute__((noinline)) void finish_rows(Index t, Index j, const S* sums) const {
    for (Index b = 0; b < job_.batch; ++b) {
      if (b + rows_ahead < job_.batch) fetch_results(t, j, b + rows_ahead);
      finish<true>(t, j, b, sums + b * width);
    }
  }
  // Rows whose results are fetched ahead of their cells: stores to memory that no cache has would
  // hold up what comes behind them.
  static constexpr Index rows_ahead = 4;
  FASTBPTT_INLINE void fetch_results(Index t, Index j, Index b) const {
    fetch_tape(t, j, b);
    if (second_.projects()) return;
    fetch(job_.y.at(t, b) + panels_.unit(j, 0), Cell::wide ? panels_.packets(j) * p : p);
  }
  void start_with_x(Index t, Index j, S* sums) const {
    const bool in_parts = parts_.x_fits(t);
    // What the product of x does not start is of the recurrent one alone.
    if (!in_parts || Cell::x_count < packets) fill(sums, job_.batch, j);
    if (in_parts) {
      parts_.multiply_x(t, j, sums + Cell::x_first * p, width,
                        panels_.bias(job_.packed, j) + Cell::x_first * p);
    } else {
      add_rows(job_.x.from(t), x_range<Cell>, j, panels_.I, panels_.x(job_.packed, j), sums);
    }
  }
  void add_rows(const Sequence<const S>& a, Range range, Index j, Index K, const S* panel,
                S* sums) const {
    parts_.need_plain([&] { panels_.pack_forward(job_.weights, const_cast<S*>(job_.packed)); });
    const Index Q = panels_.packets(j, range);
    for_row_tiles(job_.batch, Q, [&](Index R, Index row) {
      RowsProduct<S> product(sums + row * width + range.first * p, width, K, panel);
      for (Index r = 0; r < R; ++r) product.a[r] = a.at(0, row + r);
      multiply_rows(R, Q, false, product);
    });
  }

  void step_panel_directly(Index t, Index j) {
    const Weights<const S>& w = job_.weights;
    const Index I = panels_.I, K = panels_.R;
    using P = Panels<S, Cell>;
    for (Index b = 0; b < job_.batch; ++b) {
      S* const sums = (normalised ? sums_of_h(j) : sums_) + b * width;
      for (Index q = 0; q < panels_.packets(j); ++q) {
        const Index row = panels_.weight_row(j, q), n = panels_.units(panels_.unit(j, q));
        Packet<S> sum = constant<S>(0);
        if (!normalised) {
          if (w.b_ih && P::takes_b_ih(q)) sum = load(w.b_ih + row, n);
          if (w.b_hh && P::takes_b_hh(q)) sum = padd(sum, load(w.b_hh + row, n));
          if (P::takes_x(q)) sum = padd(sum, dots(w.w_ih + row * I, n, job_.x.at(t, b), I));
        }
        if (P::takes_h(q)) sum = padd(sum, dots(w.w_hh + row * K, n, h_.at(0, b), K));
        store(sums + q * p, sum);
      }
      if (!normalised) finish_apart(t, j, b, sums);
    }
  }

  // The cells of a row whose products are all known.
  __attribute__((noinline)) void norm_row(Index t, Index b) const {
    using Rows = NormRows<S, Cell>;
    const auto unit_of = [&](Index j) { return unit(t, b, j * p); };
    const auto option_of = [&](Index j) {
      return optioned_ ? view_.unit(t, b, j * p) : OptionUnit<S>{};
    };
    if (view_.missing(t, b)) return Rows::skip_forward(panels_, unit_of, option_of);
    const NormForwardRow<S> row{
        job_.packed ? job_.packed + norm_offset(job_.shape) : norm_,
        ahead(0, t * job_.batch + b),
        job_.steps * job_.batch * width,
        sums_of_h(0) + b * width,
        job_.batch * width,
        job_.tape.wide.data ? job_.tape.wide.at(t, b) + Cell::tape * panels_.H : nullptr,
        sums_of_h(panels_.count()) + job_.team.rank * Rows::forward_spare(job_.shape)};
    Rows::forward(panels_, row, unit_of, option_of);
    for (Index j = 0; j < panels_.count() && !second_.exists; ++j) round_y(t, b, j * p);
  }

  template <bool whole = false>
  FASTBPTT_INLINE ForwardUnit<S> unit(Index t, Index b, Index first) const {
    const Index n = whole ? p : panels_.units(first);
    ForwardUnit<S> u;
    u.n = n;
    if (second_.projects()) {
      u.h = inputs_ + b * second_.input_row() + first;
    } else {
      u.h_before = before_.at(0, b) + first;
      u.h = job_.y.at(t, b) + first;
    }
    if (job_.state.c) u.c = job_.state.c + b * panels_.H + first;
    if constexpr (Cell::second == Second::candidate) u.z = z_ + b * panels_.H + first;
    if constexpr (Cell::tape > 0) u.tape = tape_unit(job_.tape, t, b, first * Cell::tape);
    if (job_.weights.peephole) u.peephole = {job_.weights.peephole + first, panels_.H};
    return u;
  }

  // y as the steps behind it and the caller see it.
  template <bool whole = false>
  FASTBPTT_INLINE void round_y(Index t, Index b, Index first) const {
    if constexpr (std::is_same_v<S, float>) {
      if (!job_.narrow_y) return;
      S* const y = job_.y.at(t, b) + first;
      const Index n = whole ? p : Panels<S, Cell>::valid(panels_.R, first);
      store(y, rounded_to_bfloat16(load(y, n)), n);
    }
  }

  // The cells of a row in panel j, from its sums. Those whose packets are whole, which is all but
  // the last of an odd size, have code of their own, in which no load asks how much it may read.
  FASTBPTT_INLINE void finish_row(Index t, Index j, Index b, const S* sums) const {
    if (!optioned_ && panels_.whole(j)) {
      finish<true>(t, j, b, sums);
    } else {
      finish_apart(t, j, b, sums);
    }
  }
  __attribute__((noinline)) void finish_apart(Index t, Index j, Index b, const S* sums) const {
    finish<false>(t, j, b, sums);
  }
  template <bool whole>
  FASTBPTT_INLINE void finish(Index t, Index j, Index b, const S* sums) const {
    if (!whole && optioned_) {
      finish_optioned(t, j, b, sums);
    } else {
      cell<whole>(t, j, b, sums);
    }
    if (second_.exists) return;
    for (Index q = 0; q < (Cell::wide ? panels_.packets(j) : 1); ++q) {
      round_y<whole>(t, b, panels_.unit(j, q));
    }
  }

  template <bool whole>
  FASTBPTT_INLINE void cell(Index t, Index j, Index b, const S* sums) const {
    if constexpr (Cell::wide) {
      for (Index q = 0; q < panels_.packets(j); ++q) {
        Cell::forward(sums + q * p, unit<whole>(t, b, panels_.unit(j, q)));
      }
    } else if constexpr (Cell::second == Second::candidate) {
      Cell::forward_gates(sums, unit<whole>(t, b, j * p),
                          second_sums_ + b * second_.sums_row() + j * p,
                          inputs_ + b * second_.input_row() + j * p);
    } else {
      Cell::forward(sums, unit<whole>(t, b, j * p));
    }
  }

  __attribute__((noinline)) void finish_optioned(Index t, Index j, Index b, const S* sums) const {
    using Optioned = OptionedCell<S, Cell>;
    if constexpr (Cell::wide) {
      for (Index q = 0; q < panels_.packets(j); ++q) {
        const Index first = panels_.unit(j, q);
        Optioned::forward(sums + q * p, unit(t, b, first), view_.unit(t, b, first));
      }
    } else if constexpr (Cell::second == Second::candidate) {
      Optioned::forward_gates(sums, unit(t, b, j * p),
                              second_sums_ + b * second_.sums_row() + j * p,
                              inputs_ + b * second_.input_row() + j * p, view_.unit(t, b, j * p));
    } else {
      Optioned::forward(sums, unit(t, b, j * p), view_.unit(t, b, j * p));
    }
  }

  // Panel j of the second product, and what the cell does with it.
  void step_second(Index t, Index j) {
    const Index row_size = second_.sums_row(), K = second_.panels.I, Q = second_.panels.packets(j);
    for_row_tiles(job_.batch, Q, [&](Index R, Index row) {
      S* const sums = second_sums_ + row * row_size + 4 * j * p;
      if constexpr (Cell::second == Second::projection) {
        for (Index r = 0; r < R; ++r)
          for (Index q = 0; q < Q; ++q) store(sums + r * row_size + q * p, constant<S>(0));
      }
      if (job_.packed) {
        const S* const panel = second_.panels.x(job_.packed + panels_.size(), j);
        RowsProduct<S> product(sums, row_size, K, panel);
        for (Index r = 0; r < R; ++r) product.a[r] = inputs_ + (row + r) * second_.input_row();
        multiply_rows(R, Q, true, product);
      }
      for (Index r = 0; r < R; ++r) {
        for (Index q = 0; q < Q; ++q) {
          const Index first = (4 * j + q) * p;
          S* const sum = sums + r * row_size + q * p;
          if (!job_.packed) add_second_directly(row + r, first, sum);
          finish_second(t, row + r, first, sum);
        }
      }
    });
  }

  FASTBPTT_INLINE void finish_second(Index t, Index b, Index first, const S* sum) const {
    if constexpr (Cell::second == Second::projection) {
      const Index n = second_.panels.units(first);
      Packet<S> h = load(sum);
      if (optioned_) {
        const Packet<S> before = load(before_.at(0, b) + first, n);
        const S* const keep = view_.keep_h(b, first);
        h = view_.missing(t, b) ? before : OptionedCell<S, Cell>::mixed(keep, before, h, n);
      }
      store(job_.y.at(t, b) + first, h, n);
    } else if (optioned_) {
      OptionedCell<S, Cell>::forward_candidate(sum, unit(t, b, first), view_.unit(t, b, first));
    } else {
      Cell::forward_candidate(sum, unit(t, b, first));
    }
    round_y(t, b, first);
  }

  void add_second_directly(Index b, Index first, S* sum) const {
    const Index K = second_.panels.I;
    const S* const w = second_.weight(job_.weights) + first * K;
    const S* const input = inputs_ + b * second_.input_row();
    store(sum, padd(load(sum), dots(w, second_.panels.units(first), input, K)));
  }

  const ForwardJob<S>& job_;
  const Panels<S, Cell> panels_;
  const SecondProduct<S, Cell> second_;
  const bool ahead_;
  const bool turns_;  // whether every other step goes back through the panels
  Parts parts_;
  S* const sums_of_x_;  // sums of the input product [panels][steps * B][width], if it goes ahead
  S* const shared_sums_;
  S* const sums_;         // [B][width], of this thread's panel in work
  S* const second_sums_;  // [B][sums_row], of the second product
  S* const inputs_;       // [B][input_row], what it takes
  S* const z_;            // what the gates leave for a candidate: [B][H]
  S* const view_scratch_;
  S* const norm_;
  const bool optioned_;
  StepView<S> view_;
  Sequence<const S> h_;       // h' of the step in work, as the products see it
  Sequence<const S> before_;  // and as the cell does
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
