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
    const Index rows = (o.resets ? 1 : 0) + (o.recurrent_dropout > 0 ? 1 : 0) +
                       (o.zoneout_h > 0 ? 1 : 0) + (o.zoneout_c > 0 ? 1 : 0);
    return rows * batch * s.hidden_size;
  }

  StepView(const StepOptions<S>& options, Index batch, Index H, const Team& team, S* scratch)
      : options_(options), batch_(batch), H_(H), team_(team) {
    const auto take = [&](bool wanted) {
      S* const taken = wanted ? scratch : nullptr;
      if (wanted) scratch += batch * H;
      return taken;
    };
    restarted_ = take(options.resets.data);
    product_ = take(options.recurrent_mask);
    keep_h_ = take(options.zoneout.h > 0);
    keep_c_ = take(options.zoneout.c > 0);
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
      before_ = {restarted_, 0, H_};
      for (Index b = team_.begin(batch_); b < team_.end(batch_); ++b) {
        copy(resets(t, b) ? options_.restart.h : h.at(0, b), restarted_ + b * H_);
        if (c && resets(t, b)) copy(options_.restart.c, c + b * H_);
      }
    }
    seen_ = before_;
    if (options_.recurrent_mask) {
      seen_ = {product_, 0, H_};
      for (Index b = team_.begin(batch_); b < team_.end(batch_); ++b) {
        multiply(before_.at(0, b), options_.recurrent_mask + b * H_, product_ + b * H_);
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

  OptionUnit<S> unit(Index t, Index b, Index first) const {
    const auto at = [&](const S* rows) { return rows ? rows + b * H_ + first : nullptr; };
    OptionUnit<S> u{};
    u.missing = missing(t, b);
    u.keep_h = at(keep_h_);
    u.keep_c = at(keep_c_);
    u.seen = at(options_.recurrent_mask);
    if (options_.c.data) u.c_out = options_.c.at(t, b) + first;
    if (options_.grad_c.data) u.grad_c_out = options_.grad_c.at(t, b) + first;
    return u;
  }

  // h' of a row as the products see it, from h' as the cell does.
  void see(Index b, const S* h, S* to) const {
    copy(h, to);
    if (options_.recurrent_mask) multiply(to, options_.recurrent_mask + b * H_, to);
  }

 private:
  void copy(const S* from, S* to) const {
    for (Index i = 0; i < H_; ++i) to[i] = from ? from[i] : S(0);
  }
  void multiply(const S* a, const S* b, S* to) const {
    for (Index i = 0; i < H_; ++i) to[i] = a[i] * b[i];
  }

  void choose_kept(Index t) {
    const Zoneout& z = options_.zoneout;
    if (keep_h_) choose_kept(t, Draw::zoneout_h, z.h, keep_h_);
    if (keep_c_) choose_kept(t, Draw::zoneout_c, z.c, keep_c_);
  }
  void choose_kept(Index t, Draw draw, double rate, S* keep) const {
    const Zoneout& z = options_.zoneout;
    for (Index b = team_.begin(batch_); b < team_.end(batch_); ++b) {
      S* const row = keep + b * H_;
      if (!z.seed) {
        for (Index i = 0; i < H_; ++i) row[i] = S(rate);
      } else {
        draw_mask(*z.seed, {draw, z.layer, z.step + t * z.step_by, z.rows[b]}, 1 - rate, S(1), H_,
                  row);
      }
    }
  }

  const StepOptions<S>& options_;
  const Index batch_;
  const Index H_;
  const Team team_;
  S* restarted_;  // h' of a step at which a row begins anew [B][H]
  S* product_;    // m h' [B][H]
  S* keep_h_;     // [B][H]
  S* keep_c_;
  Sequence<const S> before_{};
  Sequence<const S> seen_{};
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
