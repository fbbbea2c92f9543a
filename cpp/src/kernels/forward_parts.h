// The products of a layer forward, made of parts: x of a run is split at once, and h' of each step
// before its products, by each thread of a team for itself, for where there are many of them a step
// has few rows.
//
//   packed   W_ih and W_hh as PartPanels, like the panels of `Panels`
//   scratch  tiles of x [steps][B][I] and the Span of each step; of h' [B][R], by thread
#pragma once
#include "cells/normalised.h"
#include "kernels/panels.h"
#include "kernels/part_panels.h"
#include "memory/caches.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// Where the instruction set has none, or what is multiplied is normalised.
template <class S, class Cell, bool = has_parts<S> && !is_normalised<Cell>>
class ForwardParts {
 public:
  static Index packed(const LayerShape&) { return 0; }
  static void pack(const LayerShape&, const Weights<const S>&, S*) {}
  template <class Pack>
  void need_plain(Pack&&) const {}
  static Index scratch(const LayerShape&, Index, Index, int) { return 0; }
  ForwardParts(const ForwardJob<S>&, const Panels<S, Cell>&, const S*, S*) {}
  static constexpr bool used() { return false; }
  void begin() {}
  void end() {}
  void begin_step(const Sequence<const S>&) {}
  bool x_fits(Index) const { return false; }
  bool h_fits() const { return false; }
  void multiply_x(Index, Index, S*, Index, const S*) const {}
  void multiply_h(Index, S*, Index) const {}
  static bool are_large(const LayerShape&) { return false; }
  static bool x_goes_ahead(const LayerShape&) { return false; }
};

#ifdef EIGEN_VECTORIZE_AVX512

template <class S, class Cell>
class ForwardParts<S, Cell, true> {
 public:
  static Index packed(const LayerShape& s) {
    return s.options.parts > 0 ? x_panels(s).size() + h_panels(s).size() : 0;
  }
  // Whether the weights do not stay in the second cache from step to step; and whether they are so
  // much more that to read those of x for each step costs more than to keep its sums, which would
  // push out others.
  static bool are_large(const LayerShape& s) { return packed(s) * Index(sizeof(S)) > second_cache; }
  static bool x_goes_ahead(const LayerShape& s) {
    return packed(s) * Index(sizeof(S)) > second_cache / 2 * 5;
  }
  static void pack(const LayerShape& s, const Weights<const S>& w, S* to) {
    if (s.options.parts == 0) return;
    const Panels<S, Cell> panels(s);
    const PartPanels x = x_panels(s);
    const auto pack = [&](const PartPanels& all, const S* weight, Index columns, Range range,
                          S* at) {
      all.pack_rows(
          at, [&](Index j) { return panels.packets(j, range); },
          [&](Index j, Index q) {
            return PartPanels::Row{weight + panels.weight_row(j, range.first + q) * columns,
                                   panels.units(panels.unit(j, range.first + q))};
          });
    };
    pack(x, w.w_ih, panels.I, x_range<Cell>, to);
    pack(h_panels(s), w.w_hh, panels.R, h_range<Cell>, to + x.size());
  }
  // Before the first product that parts are not for.
  template <class Pack>
  void need_plain(Pack&& pack) const {
    if (used()) PartPanels::once(packed_, pack);
  }

  static Index scratch(const LayerShape& s, Index steps, Index batch, int team) {
    if (s.options.parts == 0) return 0;
    return x_size(s, steps, batch) + spans_size(steps) + team * h_size(s, batch);
  }

  ForwardParts(const ForwardJob<S>& job, const Panels<S, Cell>& panels, const S* packed, S* scratch)
      : job_(job),
        panels_(panels),
        w_ih_(x_panels(job.shape)),
        w_hh_(h_panels(job.shape)),
        packed_(packed),
        x_(reinterpret_cast<Bfloat16*>(scratch)),
        spans_(reinterpret_cast<Span*>(scratch + x_size(job.shape, job.steps, job.batch))),
        h_(reinterpret_cast<Bfloat16*>(scratch + x_size(job.shape, job.steps, job.batch) +
                                       spans_size(job.steps) +
                                       job.team.rank * h_size(job.shape, job.batch))) {}

  bool used() const { return parts() > 0; }

  // x of the run, for all of the team.
  void begin() {
    if (!used()) return;
    job_.products->begin();
    for (Index t = job_.team.begin(job_.steps); t < job_.team.end(job_.steps); ++t) {
      spans_[t] =
          split(job_.x.from(t), panels_.I, x_ + t * x_step(),
                job_.options.mask.data ? job_.options.mask.from(t) : Sequence<const bool>{});
    }
    job_.team.wait();
  }
  void end() {
    if (used()) job_.products->end();
  }
  // h' of the step that follows, as its products see it.
  void begin_step(const Sequence<const S>& h) {
    if (used()) h_span_ = split(h, panels_.R, h_, {});
  }

  bool x_fits(Index t) const { return used() && fit(spans_[t], PartPanels::span(packed_)); }
  bool h_fits() const { return used() && fit(h_span_, PartPanels::span(packed_h())); }

  // Panel j of the sums, [B] rows of `width`, from the bias on, or from what they are.
  void multiply_x(Index t, Index j, S* sums, Index width, const S* bias) const {
    w_ih_.multiply(*job_.products, job_.batch, x_ + t * x_step(), rows(panels_.I), packed_, j,
                   panels_.packets(j, x_range<Cell>), sums, width, bias, 0, panels_.I);
  }
  void multiply_h(Index j, S* sums, Index width) const {
    w_hh_.multiply(*job_.products, job_.batch, h_, rows(panels_.R), packed_h(), j,
                   panels_.packets(j, h_range<Cell>), sums, width, nullptr, 0, panels_.R);
  }

 private:
  static constexpr Index p = lanes<S>;

  static PartPanels x_panels(const LayerShape& s) {
    const Panels<S, Cell> panels(s);
    return {panels.I, Cell::x_count, panels.count(), s.options.parts};
  }
  static PartPanels h_panels(const LayerShape& s) {
    const Panels<S, Cell> panels(s);
    return {panels.R, Cell::h_count, panels.count(), s.options.parts};
  }
  // Values of the parts of a step's rows.
  static Index step_size(Index batch, Index columns, int parts) {
    return padded(batch, part_rows) * PartPanels::room(columns) * parts;
  }
  static Index x_size(const LayerShape& s, Index steps, Index batch) {
    return floats_of(steps * step_size(batch, s.input_size, s.options.parts));
  }
  static Index h_size(const LayerShape& s, Index batch) {
    return floats_of(step_size(batch, s.output_size(), s.options.parts));
  }
  static Index spans_size(Index steps) {
    return padded(steps * Index(sizeof(Span) / sizeof(S)), 16);
  }

  int parts() const { return job_.shape.options.parts; }
  Index x_step() const { return step_size(job_.batch, panels_.I, parts()); }
  // From 16 rows to the next.
  Index rows(Index columns) const { return part_rows * PartPanels::room(columns) * parts(); }
  const S* packed_h() const { return packed_ + w_ih_.size(); }

  // A step's rows. Those that are missing may hold anything, which is not to decide for the others:
  // they are zeros, as on the way back.
  Span split(const Sequence<const S>& from, Index columns, Bfloat16* to,
             const Sequence<const bool>& there) const {
    const Index room = PartPanels::room(columns);
    Span span;
    for (Index b = 0; b < job_.batch; ++b) {
      const bool missing = there.data && !*there.at(0, b);
      Bfloat16* const row = to + b / part_rows * rows(columns) + b % part_rows * part_depth;
      span.add(split_row(from.at(0, b), missing ? 0 : columns, room, parts(), row));
    }
    return span;
  }

  const ForwardJob<S>& job_;
  const Panels<S, Cell>& panels_;
  const PartPanels w_ih_;
  const PartPanels w_hh_;
  const S* const packed_;
  Bfloat16* const x_;
  Span* const spans_;  // of x, by step
  Bfloat16* const h_;
  Span h_span_;
};

#endif

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
