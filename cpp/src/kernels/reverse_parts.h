// The products of a layer backward, made of parts. What is multiplied is split once for all
// products of a kind: the gate gradients of a step by the thread that has written them, in rows,
// for the recurrent product and dx; panel by panel and in pairs of rows for the weight gradients,
// for which x and h' are split transposed.
//
//   packed   W_hh and W_ih as PartPanels, like the reverse panels of `Panels`, but the gate
//            gradients in the order packet of the panel, unit, so that those of a range of packets
//            follow each other, in tiles of their own
//   scratch  tiles of the gate gradients [steps][B][packets * units] and the Span of each step and
//            panel of units; of x^T [I][steps][B] and h'^T [R][steps][B], and the Span of each
//            step; for each thread of a team, of some panels of gate gradients [packets][steps][B]
#pragma once
#include "cells/normalised.h"
#include "kernels/panels.h"
#include "kernels/part_panels.h"
#include "memory/caches.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// The weights that gate gradients are multiplied by.
enum class PartsOf { none, h, x };

// Where the instruction set has none, or what is multiplied is normalised.
template <class S, class Cell, bool = has_parts<S> && !is_normalised<Cell>>
class ReverseParts {
 public:
  static Index packed(const LayerShape&) { return 0; }
  static void pack(const LayerShape&, const Weights<const S>&, S*) {}
  template <class Pack>
  void need_plain(Pack&&) const {}
  static Index scratch(const LayerShape&, Index, Index, int) { return 0; }
  ReverseParts(const ReverseJob<S>&, const Panels<S, Cell>&, const S*, S*) {}
  static constexpr bool used() { return false; }
  void begin() {}
  void end() {}
  template <class Grads>
  void split_grads(Index, Grads&&) {}
  bool fits(PartsOf, Index) const { return false; }
  void multiply(PartsOf, Index, Index, Index, S*, const S*, Index, Index) const {}
  Index depth(PartsOf) const { return 0; }
  Index depth_at_once(PartsOf, Index) const { return 1; }
  static bool are_large(const LayerShape&) { return false; }
  template <class X, class H>
  void split_inputs(X&&, H&&) {}
  Index group() const { return 1; }
  template <class Grads>
  void split_panel(Index, Index, Grads&&) {}
  template <class ToX, class ToH, class PlainX, class PlainH>
  void add_gradients(Index, Index, ToX&&, ToH&&, PlainX&&, PlainH&&) const {}
};

#ifdef EIGEN_VECTORIZE_AVX512

template <class S, class Cell>
class ReverseParts<S, Cell, true> {
  static constexpr Index p = lanes<S>;
  static constexpr Index width = Cell::packets * p;
  using P = Panels<S, Cell>;

 public:
  static Index packed(const LayerShape& s) {
    return s.options.parts > 0 ? h_panels(s).size() + x_panels(s).size() : 0;
  }
  // Whether the recurrent weights do not stay in the second cache from step to step.
  static bool are_large(const LayerShape& s) {
    return s.options.parts > 0 && h_panels(s).size() * Index(sizeof(S)) > second_cache;
  }
  static void pack(const LayerShape& s, const Weights<const S>& w, S* to) {
    if (s.options.parts == 0) return;
    const P panels(s);
    const PartPanels of_h = h_panels(s);
    pack(panels, h_range<Cell>, panels.R, w.w_hh, of_h, to);
    pack(panels, x_range<Cell>, panels.I, w.w_ih, x_panels(s), to + of_h.size());
  }
  // Before the first product of a run that parts are not for.
  template <class Pack>
  void need_plain(Pack&& pack) const {
    if (used()) PartPanels::once(packed_, pack);
  }

  static Index scratch(const LayerShape& s, Index steps, Index batch, int team) {
    if (s.options.parts == 0) return 0;
    const P panels(s);
    return grads_size(s, steps, batch) + spans_size(steps * unit_panels(panels)) +
           transposed_size(s, panels.I, steps, batch) + transposed_size(s, panels.R, steps, batch) +
           2 * spans_size(steps) + team * pairs_size(s, steps, batch) + line;
  }

  ReverseParts(const ReverseJob<S>& job, const P& panels, const S* packed, S* scratch)
      : job_(job),
        panels_(panels),
        w_hh_(h_panels(job.shape)),
        w_ih_(x_panels(job.shape)),
        packed_(packed) {
    if (!used()) return;
    const LayerShape& s = job.shape;
    scratch += (line - reinterpret_cast<std::uintptr_t>(scratch) / sizeof(S) % line) % line;
    const auto take = [&](auto*& data, Index size) {
      data = reinterpret_cast<std::remove_reference_t<decltype(data)>>(scratch);
      scratch += size;
    };
    take(grads_, grads_size(s, job.steps, job.batch));
    take(spans_, spans_size(job.steps * unit_panels(panels)));
    take(x_.values, transposed_size(s, panels.I, job.steps, job.batch));
    take(h_.values, transposed_size(s, panels.R, job.steps, job.batch));
    take(x_.spans, spans_size(job.steps));
    take(h_.spans, spans_size(job.steps));
    scratch += job.team.rank * pairs_size(s, job.steps, job.batch);
    take(pairs_, 0);
  }

  bool used() const { return parts() > 0; }
  void begin() {
    if (used()) job_.products->begin();
  }
  void end() {
    if (used()) job_.products->end();
  }

  // The gate gradients of step t, of the units whose cells this thread has run; grads(j, row) are
  // those of panel j.
  template <class Grads>
  void split_grads(Index t, Grads&& grads) {
    if (!used()) return;
    const Index B = job_.batch, count = unit_panels(panels_), blocks = panels_.blocks();
    for (Index u = job_.team.begin(count); u < job_.team.end(count); ++u) {
      Span span;
      for (Index tile = 0; tile < B; tile += part_rows) {
        const Index n = B - tile < part_rows ? B - tile : part_rows;
        Bfloat16* const to = grads_ + t * step() + tile / part_rows * rows();
        Largest largest[part_rows];
        for (Index block = 4 * u; block < 4 * u + 4 && block < blocks; block += 2) {
          for (Index b = 0; b < n; ++b) {
            const auto packet = [&](Index q, Index block) {
              if (block >= blocks) return _mm512_setzero_ps();
              const S* const from = grads(Cell::wide ? u : block, t * B + tile + b);
              const __m512 values = _mm512_loadu_ps(from + (Cell::wide ? block % 4 : q) * p);
              largest[b].add(values);
              return values;
            };
            for (Index q = 0; q < (Cell::wide ? 1 : Cell::packets); ++q) {
              split_line(
                  packet(q, block), packet(q, block + 1), parts(),
                  to + (q * units(panels_) + block * p) * part_rows * parts() + b * part_depth);
            }
          }
        }
        for (Index b = 0; b < n; ++b) span.add(largest[b].all());
      }
      spans_[t * count + u] = span;
    }
  }

  // Whether the product of the gate gradients of step t and the weights is one of parts; and that,
  // for a panel of output columns.
  bool fits(PartsOf which, Index t) const {
    if (!used()) return false;
    Span span;
    const Index count = unit_panels(panels_);
    for (Index u = 0; u < count; ++u) span.add(spans_[t * count + u]);
    return fit(span, PartPanels::span(which == PartsOf::h ? packed_ : packed_x()));
  }
  // Of the gate gradients only [begin, end), where a tile begins; from `start` on, the same for all
  // rows, or from what the sums are.
  void multiply(PartsOf which, Index t, Index panel, Index Q, S* sums, const S* start, Index begin,
                Index end) const {
    const bool of_h = which == PartsOf::h;
    const Index first = Cell::wide ? 0 : (of_h ? Cell::h_first : Cell::x_first) * units(panels_);
    (of_h ? w_hh_ : w_ih_)
        .multiply(*job_.products, job_.batch, grads_ + t * step() + first * part_rows * parts(),
                  rows(), of_h ? packed_ : packed_x(), panel, Q, sums, 4 * p, start, begin, end);
  }

  // Values of a row that the weights are multiplied by; and so many of them that those of `rows`
  // rows stay in the second cache from one panel to the next, beside the panel.
  Index depth(PartsOf which) const { return which == PartsOf::h ? w_hh_.depth() : w_ih_.depth(); }
  Index depth_at_once(PartsOf which, Index rows) const {
    const Index all = depth(which), fit = depth_bytes / (rows * parts() * Index(sizeof(Bfloat16)));
    const Index passes = ceil_div(all, fit > part_depth ? fit : part_depth);
    return padded(ceil_div(all, passes), part_depth);
  }

  // x(t, b) and h(t, b): what the weights of step t were multiplied by. Then all of the team may
  // use them.
  template <class X, class H>
  void split_inputs(X&& x, H&& h) {
    if (!used()) return;
    const Team& team = job_.team;
    for (Index t = team.begin(job_.steps); t < team.end(job_.steps); ++t) {
      split_input(x_, panels_.I, t, x);
      split_input(h_, panels_.R, t, h);
    }
    team.wait();
  }

  // Panels of the weight gradients that are made together, so that x and h' are read once for them.
  Index group() const {
    const Index fit = depth_bytes / (Cell::packets * pairs_packet() * Index(sizeof(Bfloat16)));
    return fit < 1 ? 1 : fit > most_panels ? most_panels : fit;
  }
  // The gate gradients of panel j, place `i` of a group.
  template <class Grads>
  void split_panel(Index i, Index j, Grads&& grads) {
    const Index B = job_.batch, packets = Cell::wide ? panels_.packets(j) : Cell::packets;
    for (Index q = 0; q < packets; ++q) {
      for (Index t = 0; t < job_.steps; ++t) {
        split_pairs(room(), parts(), pairs(i) + q * pairs_packet() + t * run(), [&](Index b) {
          return b < B ? _mm512_loadu_ps(grads(j, t * B + b) + q * p) : _mm512_setzero_ps();
        });
      }
    }
  }
  // The weight gradients of panels [j, j + n), those of W_ih at to_x(panel) and of W_hh at
  // to_h(panel); plain_x(panel, begin, end) and plain_h add those of steps that parts are not for.
  template <class ToX, class ToH, class PlainX, class PlainH>
  void add_gradients(Index j, Index n, ToX&& to_x, ToH&& to_h, PlainX&& plain_x,
                     PlainH&& plain_h) const {
    add_gradients(j, n, x_range<Cell>, x_, panels_.I, to_x, plain_x);
    add_gradients(j, n, h_range<Cell>, h_, panels_.R, to_h, plain_h);
  }

 private:
  static constexpr Index depth_bytes = 384 * 1024;
  static constexpr Index columns_at_once = 8 * part_rows;
  static constexpr Index most_panels = 4;
  static constexpr Index line = 16;  // floats of a cache line, where all begins

  // x or h', transposed.
  struct Transposed {
    Bfloat16* values = nullptr;
    Span* spans = nullptr;
  };

  static PartPanels h_panels(const LayerShape& s) {
    const P panels(s);
    return {gates(panels, h_range<Cell>), 4, P::reverse_panels(panels.R), s.options.parts};
  }
  static PartPanels x_panels(const LayerShape& s) {
    const P panels(s);
    return {gates(panels, x_range<Cell>), 4, P::reverse_panels(panels.I), s.options.parts};
  }
  static void pack(const P& panels, Range range, Index columns, const S* weight,
                   const PartPanels& to_panels, S* to) {
    const auto packets = [=](Index panel) { return P::reverse_packets(columns, panel); };
    to_panels.pack_columns(to, packets, [&](Index panel, Index packet, Index k) {
      const Index unit = k % units(panels), q = k / units(panels),
                  first = panel * 4 * p + packet * p;
      if (unit >= panels.H) return PartPanels::Row{nullptr, 0};
      const Index gate = Cell::gate[Cell::wide ? 0 : range.first + q];
      return PartPanels::Row{weight + (gate * panels.H + unit) * columns + first,
                             P::valid(columns, first)};
    });
  }

  // Panels of output columns that are units, whose cells one thread runs.
  static Index unit_panels(const P& panels) { return P::reverse_panels(panels.H); }
  // Hidden units in whole tiles, and the gate gradients of a range of packets.
  static Index units(const P& panels) { return padded(panels.blocks() * p, part_depth); }
  static Index gates(const P& panels, Range range) {
    return (Cell::wide ? 1 : range.count) * units(panels);
  }
  static Index spans_size(Index count) {
    return padded(count * Index(sizeof(Span) / sizeof(S)), 16);
  }
  static Index row(const LayerShape& s) { return gates(P(s), {0, Cell::packets}); }
  static Index grads_size(const LayerShape& s, Index steps, Index batch) {
    return floats_of(s.options.parts * steps * padded(batch, part_rows) * row(s));
  }
  // Rows of a step where they are the depth of a product: of less than a tile no more than needed.
  static Index room(const LayerShape& s, Index batch) {
    return padded(batch, batch < part_depth ? s.options.part_depth : part_depth);
  }
  static Index transposed_size(const LayerShape& s, Index columns, Index steps, Index batch) {
    return floats_of(s.options.parts * padded(columns, part_rows) * steps * room(s, batch));
  }
  static Index pairs_size(const LayerShape& s, Index steps, Index batch) {
    return most_panels * floats_of(s.options.parts * steps * room(s, batch) * width);
  }

  int parts() const { return job_.shape.options.parts; }
  Index room() const { return room(job_.shape, job_.batch); }
  // Values of the parts of 16 rows of gate gradients, and of those of a step.
  Index rows() const { return part_rows * row(job_.shape) * parts(); }
  Index step() const { return ceil_div(job_.batch, part_rows) * rows(); }
  // Of 16 columns of x or h', or of a packet of gate gradients, in a step.
  Index run() const { return part_rows * room() * parts(); }
  Index pairs_packet() const { return job_.steps * run(); }
  Bfloat16* pairs(Index i) const { return pairs_ + i * Cell::packets * pairs_packet(); }
  const S* packed_x() const { return packed_ + w_hh_.size(); }

  template <class Row>
  void split_input(const Transposed& to, Index columns, Index t, Row&& row) const {
    to.spans[t] =
        split_transposed(job_.batch, room(), tile_width(), columns, parts(), to.values + t * run(),
                         job_.steps * run(), [&](Index b) { return row(t, b); });
  }
  Index tile_width() const { return room() < part_depth ? room() : part_depth; }

  // From the last step to the first, in runs of steps that are alike for all panels.
  template <class To, class Plain>
  void add_gradients(Index j, Index n, Range range, const Transposed& a, Index columns, To&& to,
                     Plain&& plain) const {
    const Index depth = padded(job_.batch, job_.products->depth), count = unit_panels(panels_);
    const auto fits = [&](Index t, Index i) {
      const Index u = Cell::wide ? j + i : (j + i) / 4;
      return fit(a.spans[t], spans_[t * count + u]);
    };
    const auto alike = [&](Index s, Index t) {
      for (Index i = 0; i < n; ++i) {
        if (fits(s, i) != fits(t, i)) return false;
      }
      return true;
    };
    for (Index end = job_.steps; end > 0;) {
      Index begin = end - 1;
      while (begin > 0 && alike(begin - 1, end - 1)) --begin;
      for (Index row = 0; row < columns; row += columns_at_once) {
        const Index rows = columns - row < columns_at_once ? columns - row : columns_at_once;
        for (Index i = 0; i < n; ++i) {
          if (!fits(end - 1, i)) continue;
          const Index Q = panels_.packets(j + i, range);
          job_.products->multiply(
              {parts(), rows, static_cast<int>(Q), depth, end - begin,
               a.values + row / part_rows * job_.steps * run() + (end - 1) * run(), -run(),
               job_.steps * run(), tile_width(),
               pairs(i) + range.first * pairs_packet() + (end - 1) * run(), -run(), pairs_packet(),
               to(j + i) + row * Q * p, Q * p, nullptr});
        }
      }
      for (Index i = 0; i < n; ++i) {
        if (!fits(end - 1, i)) plain(j + i, begin, end);
      }
      end = begin;
    }
  }

  const ReverseJob<S>& job_;
  const P& panels_;
  const PartPanels w_hh_;
  const PartPanels w_ih_;
  const S* const packed_;
  Bfloat16* grads_ = nullptr;
  Span* spans_ = nullptr;
  Transposed x_;
  Transposed h_;
  Bfloat16* pairs_ = nullptr;
};

#endif

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
