// The options of a step around any cell, whose own arithmetic does not know of them:
//
//   mask (missing steps)             h = h', c = c' where the row's step is missing
//   zoneout (Krueger et al. 2017)    h = k_h h' + (1 - k_h) h~, c = k_c c' + (1 - k_c) c~, with h~
//                                    and c~ from the cell; k is 1 where a unit keeps its value and
//                                    else 0, or, for the expectation, the probability of that
//   return_cells                     c is written to another place too
//
// and, around those cells that have a second product, recurrent dropout: what the products see is m
// h'. Peepholes are the cell's own; here they are only chosen.
#pragma once
#include "cells/unit.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// The options of one packet of hidden units; what is null is not there.
template <class S>
struct OptionUnit {
  bool missing = false;
  const S* keep_h = nullptr;
  const S* keep_c = nullptr;
  const S* seen = nullptr;  // m
  S* c_out = nullptr;
  const S* grad_c_out = nullptr;
};

template <class S, class Cell>
struct OptionedCell {
  static constexpr Index p = lanes<S>;

  static FASTBPTT_INLINE Packet<S> mixed(const S* keep, const Packet<S>& before,
                                         const Packet<S>& now, Index n) {
    if (!keep) return now;
    const Packet<S> k = load(keep, n);
    return pmadd(k, before, pmul(one_minus<S>(k), now));
  }

  static FASTBPTT_INLINE void forward(const S* sums, const ForwardUnit<S>& u,
                                      const OptionUnit<S>& o) {
    if (o.missing) return carry_over(u, o);
    if constexpr (Cell::has_c) {
      const Packet<S> c = load(u.c, u.n);
      Cell::template forward<true>(sums, u);
      if (o.keep_c || o.c_out) keep_cell(u, o, mixed(o.keep_c, c, load(u.c, u.n), u.n));
    } else {
      Cell::forward(sums, u);
    }
    if (o.keep_h) store(u.h, mixed(o.keep_h, load(u.h_before, u.n), load(u.h, u.n), u.n), u.n);
  }

  // A step that is missing.
  static FASTBPTT_INLINE void carry_over(const ForwardUnit<S>& u, const OptionUnit<S>& o) {
    store(u.h, u.h_before ? load(u.h_before, u.n) : constant<S>(0), u.n);
    if constexpr (Cell::has_c) keep_cell(u, o, load(u.c, u.n));
  }
  // Takes h~ and c~, while c' is still in its place.
  static FASTBPTT_INLINE void keep(const ForwardUnit<S>& u, const OptionUnit<S>& o,
                                   const Packet<S>& h, const Packet<S>& c) {
    keep_cell(u, o, o.keep_c ? mixed(o.keep_c, load(u.c, u.n), c, u.n) : c);
    store(u.h, o.keep_h ? mixed(o.keep_h, load(u.h_before, u.n), h, u.n) : h, u.n);
  }

  static FASTBPTT_INLINE void forward_gates(const S* sums, const ForwardUnit<S>& u, S* candidate,
                                            S* reset, const OptionUnit<S>& o) {
    if (o.missing) {
      store(candidate, constant<S>(0));
      return store(reset, constant<S>(0), u.n);
    }
    Cell::forward_gates(sums, u, candidate, reset);
    if (o.seen) store(reset, pmul(load(reset, u.n), load(o.seen, u.n)), u.n);
  }
  static FASTBPTT_INLINE void forward_candidate(const S* sum, const ForwardUnit<S>& u,
                                                const OptionUnit<S>& o) {
    const Packet<S> h = load(u.h_before, u.n);
    if (o.missing) return store(u.h, h, u.n);
    Cell::forward_candidate(sum, u);
    if (o.keep_h) store(u.h, mixed(o.keep_h, h, load(u.h, u.n), u.n), u.n);
  }

  // Whatever the cell, carry_h is written where there is one: what goes past the cell, and its own.
  static FASTBPTT_INLINE void backward(const Packet<S>& grad_h, const ReverseUnit<S>& unit,
                                       const OptionUnit<S>& o) {
    if (o.missing) return pass_back(grad_h, unit, o);
    ReverseUnit<S> u = unit;
    add_own_cell(u, o);
    const Packet<S> past_h = part(o.keep_h, grad_h, u.n), grad = psub(grad_h, past_h);
    if constexpr (Cell::has_c) {
      const Packet<S> past_c = part(o.keep_c, load(u.carry_c, u.n), u.n);
      alignas(64) S c[p];
      if (o.keep_c) {
        store(c, Cell::cell(u));
        u.c = {c};
        store(u.carry_c, psub(load(u.carry_c, u.n), past_c), u.n);
      }
      Cell::template backward<true>(grad, u);
      if (o.keep_c) store(u.carry_c, padd(load(u.carry_c, u.n), past_c), u.n);
    } else {
      Cell::backward(grad, u);
    }
    finish_carry(past_h, u, o);
  }

  // A step that is missing.
  static FASTBPTT_INLINE void pass_back(const Packet<S>& grad_h, const ReverseUnit<S>& u,
                                        const OptionUnit<S>& o) {
    add_own_cell(u, o);
    for (Index q = 0; q < (Cell::wide ? 1 : Cell::packets); ++q) {
      store(u.grads + q * p, constant<S>(0));
    }
    if (u.carry_h) store(u.carry_h, grad_h, u.n);
    if (u.output) store(u.output, constant<S>(0), u.n);
  }

  static FASTBPTT_INLINE void backward_candidate(const Packet<S>& grad_h, const ReverseUnit<S>& u,
                                                 S* grad_sum, S* reset, const OptionUnit<S>& o) {
    if (o.missing) {
      for (Index q = 0; q < Cell::packets; ++q) store(u.grads + q * p, constant<S>(0));
      store(grad_sum, constant<S>(0));
      store(reset, constant<S>(0), u.n);
      return store(u.carry_h, grad_h, u.n);
    }
    const Packet<S> past_h = part(o.keep_h, grad_h, u.n);
    Cell::backward_candidate(psub(grad_h, past_h), u, grad_sum, reset);
    if (o.seen) store(reset, pmul(load(reset, u.n), load(o.seen, u.n)), u.n);
    finish_carry(past_h, u, o);
  }
  static FASTBPTT_INLINE void backward_gates(const Packet<S>& grad_reset, const ReverseUnit<S>& u,
                                             const OptionUnit<S>& o) {
    if (o.missing) return;
    Cell::backward_gates(o.seen ? pmul(grad_reset, load(o.seen, u.n)) : grad_reset, u);
  }

 private:
  static FASTBPTT_INLINE void add_own_cell(const ReverseUnit<S>& u, const OptionUnit<S>& o) {
    if constexpr (Cell::has_c) {
      if (o.grad_c_out) store(u.carry_c, padd(load(u.carry_c, u.n), load(o.grad_c_out, u.n)), u.n);
    }
  }
  static FASTBPTT_INLINE Packet<S> part(const S* keep, const Packet<S>& grad, Index n) {
    return keep ? pmul(load(keep, n), grad) : constant<S>(0);
  }

  static FASTBPTT_INLINE void keep_cell(const ForwardUnit<S>& u, const OptionUnit<S>& o,
                                        const Packet<S>& c) {
    store(u.c, c, u.n);
    if (u.tape) u.tape.keep(Cell::tape - 1, c, u.n);
    if (o.c_out) store(o.c_out, c, u.n);
  }

  static FASTBPTT_INLINE void finish_carry(const Packet<S>& past_h, const ReverseUnit<S>& u,
                                           const OptionUnit<S>& o) {
    if (!u.carry_h) return;
    if (!Cell::carries_h)
      store(u.carry_h, past_h, u.n);
    else if (o.keep_h)
      store(u.carry_h, padd(load(u.carry_h, u.n), past_h), u.n);
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
