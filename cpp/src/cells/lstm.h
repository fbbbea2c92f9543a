// LSTM (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000).
//
//   i, f, o = s(a + u),  g = tanh(a + u),  c = f c' + i g,  h = o tanh(c)
//
// With peepholes (Gers & Schmidhuber 2000) the sums of i and f also take p_i c' and p_f c', that of
// o takes p_o c, unit by unit. With coupled gates (Greff et al. 2017) there is no i but 1 - f.
// With a projection (Sak et al. 2014) h = W_hr (o tanh(c)), P values, and u = W_hh h'.
#pragma once
#include "cells/unit.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// sum + p c, and its way back: what c gets, and the gradient of p.
template <class S>
FASTBPTT_INLINE Packet<S> peep(const Peephole<const S>& p, Index gate, const Packet<S>& c,
                               const Packet<S>& sum, Index n) {
  return pmadd(load(p.at(gate), n), c, sum);
}
template <class S>
FASTBPTT_INLINE Packet<S> peep_back(const ReverseUnit<S>& u, Index gate, const Packet<S>& grad_sum,
                                    const Packet<S>& c, const Packet<S>& grad_c) {
  if (u.grad_peephole.data) {
    S* const grad = u.grad_peephole.at(gate);
    store(grad, pmadd(grad_sum, c, load(grad, u.n)), u.n);
  }
  return pmadd(load(u.peephole.at(gate), u.n), grad_sum, grad_c);
}

// Panel: the packets i, f, g, o of the same hidden units. Tape: i, f, g, o, c.
template <class S>
struct LstmCell {
  static constexpr bool wide = false;
  static constexpr Second second = Second::none;
  static constexpr bool carries_h = false;
  static constexpr bool has_c = true;
  static constexpr int packets = 4;
  static constexpr int x_first = 0, x_count = 4, h_first = 0, h_count = 4;
  static constexpr int gate[] = {0, 1, 2, 3};
  static constexpr int tape = 5;

  template <bool peepholes = false>
  static FASTBPTT_INLINE void forward(const S* sums, const ForwardUnit<S>& u) {
    constexpr Index p = lanes<S>;
    Packet<S> s_i = load(sums), s_f = load(sums + p), s_o = load(sums + 3 * p);
    const Packet<S> before = load(u.c, u.n);
    if constexpr (peepholes) {
      s_i = peep(u.peephole, 0, before, s_i, u.n);
      s_f = peep(u.peephole, 1, before, s_f, u.n);
    }
    const Packet<S> i = logistic<S>(s_i), f = logistic<S>(s_f), g = tanh_of(load(sums + 2 * p));
    const Packet<S> c = pmadd(f, before, pmul(i, g));
    if constexpr (peepholes) s_o = peep(u.peephole, 2, c, s_o, u.n);
    const Packet<S> o = logistic<S>(s_o);
    store(u.c, c, u.n);
    store(u.h, pmul(o, tanh_of(c)), u.n);
    if (!u.tape) return;
    u.tape.keep_activation(0, i, u.n);
    u.tape.keep_activation(1, f, u.n);
    u.tape.keep_activation(2, g, u.n);
    u.tape.keep_activation(3, o, u.n);
    u.tape.keep(4, c, u.n);
  }

  // c again, from the gates.
  static FASTBPTT_INLINE Packet<S> cell(const ReverseUnit<S>& u) {
    const Packet<S> i = u.tape.activation(0, u.n), f = u.tape.activation(1, u.n),
                    g = u.tape.activation(2, u.n);
    return pmadd(f, u.c_before.value(u.n), pmul(i, g));
  }

  template <bool peepholes = false>
  static FASTBPTT_INLINE void backward(const Packet<S>& grad_h, const ReverseUnit<S>& u) {
    constexpr Index p = lanes<S>;
    const Packet<S> i = u.tape.activation(0, u.n), f = u.tape.activation(1, u.n),
                    g = u.tape.activation(2, u.n), o = u.tape.activation(3, u.n);
    const Packet<S> value = u.c.value(u.n), before = u.c_before.value(u.n);
    const Packet<S> t = tanh_of(value);
    const Packet<S> through_o = pmul(grad_h, o);
    const Packet<S> s_o = pmul(pmul(through_o, t), one_minus<S>(o));
    Packet<S> c = pmadd(through_o, one_minus<S>(pmul(t, t)), load(u.carry_c, u.n));
    if constexpr (peepholes) c = peep_back(u, 2, s_o, value, c);
    const Packet<S> s_i = pmul(pmul(c, g), pmul(i, one_minus<S>(i)));
    const Packet<S> s_f = pmul(pmul(c, before), pmul(f, one_minus<S>(f)));
    store(u.grads, s_i);
    store(u.grads + p, s_f);
    store(u.grads + 2 * p, pmul(pmul(c, i), one_minus<S>(pmul(g, g))));
    store(u.grads + 3 * p, s_o);
    Packet<S> carry = pmul(c, f);
    if constexpr (peepholes) {
      carry = peep_back(u, 0, s_i, before, carry);
      carry = peep_back(u, 1, s_f, before, carry);
    }
    store(u.carry_c, carry, u.n);
  }
};

// Panel: f, g, o. Tape: f, g, o, c.
template <class S>
struct LstmCoupledCell {
  static constexpr bool wide = false;
  static constexpr Second second = Second::none;
  static constexpr bool carries_h = false;
  static constexpr bool has_c = true;
  static constexpr int packets = 3;
  static constexpr int x_first = 0, x_count = 3, h_first = 0, h_count = 3;
  static constexpr int gate[] = {0, 1, 2};
  static constexpr int tape = 4;

  template <bool peepholes = false>
  static FASTBPTT_INLINE void forward(const S* sums, const ForwardUnit<S>& u) {
    constexpr Index p = lanes<S>;
    Packet<S> s_f = load(sums), s_o = load(sums + 2 * p);
    const Packet<S> before = load(u.c, u.n);
    if constexpr (peepholes) s_f = peep(u.peephole, 0, before, s_f, u.n);
    const Packet<S> f = logistic<S>(s_f), g = tanh_of(load(sums + p));
    const Packet<S> c = pmadd(f, psub(before, g), g);
    if constexpr (peepholes) s_o = peep(u.peephole, 1, c, s_o, u.n);
    const Packet<S> o = logistic<S>(s_o);
    store(u.c, c, u.n);
    store(u.h, pmul(o, tanh_of(c)), u.n);
    if (!u.tape) return;
    u.tape.keep_activation(0, f, u.n);
    u.tape.keep_activation(1, g, u.n);
    u.tape.keep_activation(2, o, u.n);
    u.tape.keep(3, c, u.n);
  }

  static FASTBPTT_INLINE Packet<S> cell(const ReverseUnit<S>& u) {
    const Packet<S> f = u.tape.activation(0, u.n), g = u.tape.activation(1, u.n);
    return pmadd(f, psub(u.c_before.value(u.n), g), g);
  }

  template <bool peepholes = false>
  static FASTBPTT_INLINE void backward(const Packet<S>& grad_h, const ReverseUnit<S>& u) {
    constexpr Index p = lanes<S>;
    const Packet<S> f = u.tape.activation(0, u.n), g = u.tape.activation(1, u.n),
                    o = u.tape.activation(2, u.n);
    const Packet<S> value = u.c.value(u.n), before = u.c_before.value(u.n);
    const Packet<S> t = tanh_of(value);
    const Packet<S> through_o = pmul(grad_h, o);
    const Packet<S> s_o = pmul(pmul(through_o, t), one_minus<S>(o));
    Packet<S> c = pmadd(through_o, one_minus<S>(pmul(t, t)), load(u.carry_c, u.n));
    if constexpr (peepholes) c = peep_back(u, 1, s_o, value, c);
    const Packet<S> through_f = pmul(c, f);
    const Packet<S> s_f = pmul(pmul(through_f, psub(before, g)), one_minus<S>(f));
    store(u.grads, s_f);
    store(u.grads + p, pmul(psub(c, through_f), one_minus<S>(pmul(g, g))));
    store(u.grads + 2 * p, s_o);
    Packet<S> carry = through_f;
    if constexpr (peepholes) carry = peep_back(u, 0, s_f, before, carry);
    store(u.carry_c, carry, u.n);
  }
};

// To the cell, h is o tanh(c), and grad_h its gradient: the projection comes behind it.
template <class S>
struct LstmProjectedCell : LstmCell<S> {
  static constexpr Second second = Second::projection;

  // o tanh(c) again goes to `output`.
  static FASTBPTT_INLINE void backward(const Packet<S>& grad, const ReverseUnit<S>& u, S* output) {
    const Packet<S> o = u.tape.activation(3, u.n);
    store(output, pmul(o, tanh_of(u.c.value(u.n))), u.n);
    LstmCell<S>::backward(grad, u);
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
