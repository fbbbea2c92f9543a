// What the options of a layer change of a step before the cell is reached: the state that it begins
// with, what the products see of it, and which units zoneout keeps.
#pragma once
#include "cells/optioned.h"
#include "fastbptt/random.h"
#include "kernels/kernel_table.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
class StepView {
 public:
  static Index scratch(const LayerShape& s, Index batch) {
    const LayerOptions& o = s.options;
    const Index rows_of_h =
        (o.resets ? 1 : 0) + (o.recurrent_dropout > 0 ? 1 : 0) + (o.zoneout_h > 0 ? 1 : 0);
    return batch * (rows_of_h * s.output_size() + (o.zoneout_c > 0 ? s.hidden_size : 0));
  }

  StepView(const StepOptions<S>& options, Index batch, const LayerShape& shape, const Team& team,
           S* scratch)
      : options_(options),
        batch_(batch),
        H_(shape.hidden_size),
        R_(shape.output_size()),
        projects_(shape.proj_size > 0),
        team_(team) {
    const auto take = [&](bool wanted, Index columns) {
      S* const taken = wanted ? scratch : nullptr;
      if (wanted) scratch += batch * columns;
      return taken;
    };
    restarted_ = take(options.resets.data, R_);
    product_ = take(options.recurrent_mask, R_);
    keep_h_ = take(options.zoneout.h > 0, R_);
    keep_c_ = take(options.zoneout.c > 0, H_);
  }

  bool resets(Index t, Index b) const { return options_.resets.data && *options_.resets.at(t, b); }
  bool missing(Index t, Index b) const { return options_.mask.data && !*options_.mask.at(t, b); }
  bool any_reset(Index t) const {
    bool any = false;
    for (Index b = 0; b < batch_; ++b) any |= resets(t, b);
    return any;
  }

  // h' and c' as the step before left them; c' is changed where a row begins anew.
  void begin_forward(Index t, const Sequence<const S>& h, S* c) {
    before_ = h;
    const bool anew = any_reset(t);
    if (anew) {
      before_ = {restarted_, 0, R_};
      for (Index b = team_.begin(batch_); b < team_.end(batch_); ++b) {
        copy(resets(t, b) ? options_.restart.h : h.at(0, b), R_, restarted_ + b * R_);
        if (c && resets(t, b)) copy(options_.restart.c, H_, c + b * H_);
      }
    }
    seen_ = before_;
    if (options_.recurrent_mask) {
      seen_ = {product_, 0, R_};
      for (Index b = team_.begin(batch_); b < team_.end(batch_); ++b) {
        multiply(before_.at(0, b), options_.recurrent_mask + b * R_, product_ + b * R_);
      }
    }
    choose_kept(t);
    team_.wait();
  }
  void begin_reverse(Index t) {
    choose_kept(t);
    team_.wait();
  }

  // h' of the step that was begun, as the cell takes it, and as the products with W_hh do.
  const Sequence<const S>& before() const { return before_; }
  const Sequence<const S>& seen() const { return seen_; }

  // The units of a cell, whose h a projection takes with it.
  OptionUnit<S> unit(Index t, Index b, Index first) const {
    OptionUnit<S> u;
    u.missing = missing(t, b);
    if (keep_c_) u.keep_c = keep_c_ + b * H_ + first;
    if (!projects_) {
      u.keep_h = keep_h(b, first);
      if (options_.recurrent_mask) u.seen = options_.recurrent_mask + b * R_ + first;
    }
    if (options_.c.data) u.c_out = options_.c.at(t, b) + first;
    if (options_.grad_c.data) u.grad_c_out = options_.grad_c.at(t, b) + first;
    return u;
  }

  // What zoneout keeps of h, from value `first` on; null: nothing.
  const S* keep_h(Index b, Index first) const {
    return keep_h_ ? keep_h_ + b * R_ + first : nullptr;
  }

  // h' of a row as the products see it, from h' as the cell does.
  void see(Index b, const S* h, S* to) const {
    copy(h, R_, to);
    if (options_.recurrent_mask) multiply(to, options_.recurrent_mask + b * R_, to);
  }

 private:
  static void copy(const S* from, Index n, S* to) {
    for (Index i = 0; i < n; ++i) to[i] = from ? from[i] : S(0);
  }
  void multiply(const S* a, const S* b, S* to) const {
    for (Index i = 0; i < R_; ++i) to[i] = a[i] * b[i];
  }

  void choose_kept(Index t) {
    const Zoneout& z = options_.zoneout;
    if (keep_h_) choose_kept(t, Draw::zoneout_h, z.h, R_, keep_h_);
    if (keep_c_) choose_kept(t, Draw::zoneout_c, z.c, H_, keep_c_);
  }
  void choose_kept(Index t, Draw draw, double rate, Index columns, S* keep) const {
    const Zoneout& z = options_.zoneout;
    for (Index b = team_.begin(batch_); b < team_.end(batch_); ++b) {
      S* const row = keep + b * columns;
      if (!z.seed) {
        for (Index i = 0; i < columns; ++i) row[i] = S(rate);
      } else {
        draw_mask(*z.seed, {draw, z.layer, z.step + t * z.step_by, z.rows[b]}, 1 - rate, S(1),
                  columns, row);
      }
    }
  }

  const StepOptions<S>& options_;
  const Index batch_;
  const Index H_;
  const Index R_;  // values of h
  const bool projects_;
  const Team team_;
  S* restarted_;  // h' of a step at which a row begins anew [B][R]
  S* product_;    // m h' [B][R]
  S* keep_h_;     // [B][R]
  S* keep_c_;     // [B][H]
  Sequence<const S> before_{};
  Sequence<const S> seen_{};
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
