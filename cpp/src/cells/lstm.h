// LSTM (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000).
//
//   i, f, o = s(a + u),  g = tanh(a + u),  c = f c' + i g,  h = o tanh(c)
//
// With peepholes (Gers & Schmidhuber 2000) the sums of i and f also take p_i c' and p_f c', that of
// o takes p_o c, unit by unit. With coupled gates (Greff et al. 2017) there is no i but 1 - f.
// With a projection (Sak et al. 2014) h = W_hr (o tanh(c)), P values, and u = W_hh h'. It comes
// behind the cell, whose own h is o tanh(c).
#pragma once
#include "cells/unit.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// sum + p c, and its way back: what c gets, and the gradient of p. Without p the sum as it is.
// Cells ask only if their `peepholes` says that there may be some, so a plain layer does not.
template <class S>
FASTBPTT_INLINE Packet<S> peep(const Peephole<const S>& p, Index gate, const Packet<S>& c,
                               const Packet<S>& sum, Index n) {
  return p.data ? pmadd(load(p.at(gate), n), c, sum) : sum;
}
template <class S>
FASTBPTT_INLINE Packet<S> peep_back(const ReverseUnit<S>& u, Index gate, const Packet<S>& grad_sum,
                                    const Packet<S>& c, const Packet<S>& grad_c) {
  if (!u.peephole.data) return grad_c;
  if (u.grad_peephole.data) {
    S* const grad = u.grad_peephole.at(gate);
    store(grad, pmadd(grad_sum, c, load(grad, u.n)), u.n);
  }
  return pmadd(load(u.peephole.at(gate), u.n), grad_sum, grad_c);
}

// The gates of a packet of units, and the c that they make.
template <class S>
struct LstmGates {
  Packet<S> i, f, g, o, c;
};

// From the sums to h, and from dL/dh to the gradients of the sums, around the gates of either LSTM.
template <template <class> class Cell, bool peepholes, class S>
FASTBPTT_INLINE LstmGates<S> lstm_forward(const S* sums, const ForwardUnit<S>& u) {
  const LstmGates<S> a = Cell<S>::template gates<peepholes>(sums, load(u.c, u.n), u.peephole, u.n);
  store(u.c, a.c, u.n);
  store(u.h, pmul(a.o, tanh_of(a.c)), u.n);
  return a;
}
template <template <class> class Cell, bool peepholes, class S>
FASTBPTT_INLINE void lstm_backward(const Packet<S>& grad_h, const LstmGates<S>& a,
                                   const ReverseUnit<S>& u) {
  const Packet<S> t = tanh_of(a.c);
  if (u.output) store(u.output, pmul(a.o, t), u.n);
  const Packet<S> through_o = pmul(grad_h, a.o);
  const Packet<S> s_o = pmul(pmul(through_o, t), one_minus<S>(a.o));
  const Packet<S> c = pmadd(through_o, one_minus<S>(pmul(t, t)), load(u.carry_c, u.n));
  Cell<S>::template gates_back<peepholes>(a, u.c_before.value(u.n), c, s_o, u);
}

// Panel: the packets i, f, g, o of the same hidden units. Tape: i, f, g, o, c.
template <class S>
struct LstmCell {
  static constexpr bool wide = false;
  static constexpr Second second = Second::projection;
  static constexpr bool carries_h = false;
  static constexpr bool has_c = true;
  static constexpr int packets = 4;
  static constexpr int x_first = 0, x_count = 4, h_first = 0, h_count = 4;
  static constexpr int gate[] = {0, 1, 2, 3};
  static constexpr int tape = 5;

  // The gates and c, from the sums and c'.
  template <bool peepholes>
  static FASTBPTT_INLINE LstmGates<S> gates(const S* sums, const Packet<S>& before,
                                            const Peephole<const S>& peephole, Index n) {
    constexpr Index p = lanes<S>;
    Packet<S> s_i = load(sums), s_f = load(sums + p), s_o = load(sums + 3 * p);
    if constexpr (peepholes) {
      s_i = peep(peephole, 0, before, s_i, n);
      s_f = peep(peephole, 1, before, s_f, n);
    }
    LstmGates<S> a;
    a.i = logistic<S>(s_i), a.f = logistic<S>(s_f), a.g = tanh_of(load(sums + 2 * p));
    a.c = pmadd(a.f, before, pmul(a.i, a.g));
    if constexpr (peepholes) s_o = peep(peephole, 2, a.c, s_o, n);
    a.o = logistic<S>(s_o);
    return a;
  }

  template <bool peepholes = false>
  static FASTBPTT_INLINE void forward(const S* sums, const ForwardUnit<S>& u) {
    const LstmGates<S> a = lstm_forward<LstmCell, peepholes>(sums, u);
    if (!u.tape) return;
    u.tape.keep_activation(0, a.i, u.n);
    u.tape.keep_activation(1, a.f, u.n);
    u.tape.keep_activation(2, a.g, u.n);
    u.tape.keep_activation(3, a.o, u.n);
    u.tape.keep(4, a.c, u.n);
  }

  // c again, from the gates.
  static FASTBPTT_INLINE Packet<S> cell(const ReverseUnit<S>& u) {
    const Packet<S> i = u.tape.activation(0, u.n), f = u.tape.activation(1, u.n),
                    g = u.tape.activation(2, u.n);
    return pmadd(f, u.c_before.value(u.n), pmul(i, g));
  }

  template <bool peepholes = false>
  static FASTBPTT_INLINE void backward(const Packet<S>& grad_h, const ReverseUnit<S>& u) {
    const Packet<S> i = u.tape.activation(0, u.n), f = u.tape.activation(1, u.n),
                    g = u.tape.activation(2, u.n), o = u.tape.activation(3, u.n);
    lstm_backward<LstmCell, peepholes>(grad_h, {i, f, g, o, u.c.value(u.n)}, u);
  }

  // From the gradients of c, so far, and of the sum of o.
  template <bool peepholes>
  static FASTBPTT_INLINE void gates_back(const LstmGates<S>& a, const Packet<S>& before,
                                         const Packet<S>& grad_c, const Packet<S>& s_o,
                                         const ReverseUnit<S>& u) {
    constexpr Index p = lanes<S>;
    Packet<S> c = grad_c;
    if constexpr (peepholes) c = peep_back(u, 2, s_o, a.c, c);
    const Packet<S> s_i = pmul(pmul(c, a.g), pmul(a.i, one_minus<S>(a.i)));
    const Packet<S> s_f = pmul(pmul(c, before), pmul(a.f, one_minus<S>(a.f)));
    store(u.grads, s_i);
    store(u.grads + p, s_f);
    store(u.grads + 2 * p, pmul(pmul(c, a.i), one_minus<S>(pmul(a.g, a.g))));
    store(u.grads + 3 * p, s_o);
    Packet<S> carry = pmul(c, a.f);
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
  static constexpr Second second = Second::projection;
  static constexpr bool carries_h = false;
  static constexpr bool has_c = true;
  static constexpr int packets = 3;
  static constexpr int x_first = 0, x_count = 3, h_first = 0, h_count = 3;
  static constexpr int gate[] = {0, 1, 2};
  static constexpr int tape = 4;

  template <bool peepholes>
  static FASTBPTT_INLINE LstmGates<S> gates(const S* sums, const Packet<S>& before,
                                            const Peephole<const S>& peephole, Index n) {
    constexpr Index p = lanes<S>;
    Packet<S> s_f = load(sums), s_o = load(sums + 2 * p);
    if constexpr (peepholes) s_f = peep(peephole, 0, before, s_f, n);
    LstmGates<S> a;
    a.f = logistic<S>(s_f), a.g = tanh_of(load(sums + p)), a.i = one_minus<S>(a.f);
    a.c = pmadd(a.f, psub(before, a.g), a.g);
    if constexpr (peepholes) s_o = peep(peephole, 1, a.c, s_o, n);
    a.o = logistic<S>(s_o);
    return a;
  }

  template <bool peepholes = false>
  static FASTBPTT_INLINE void forward(const S* sums, const ForwardUnit<S>& u) {
    const LstmGates<S> a = lstm_forward<LstmCoupledCell, peepholes>(sums, u);
    if (!u.tape) return;
    u.tape.keep_activation(0, a.f, u.n);
    u.tape.keep_activation(1, a.g, u.n);
    u.tape.keep_activation(2, a.o, u.n);
    u.tape.keep(3, a.c, u.n);
  }

  static FASTBPTT_INLINE Packet<S> cell(const ReverseUnit<S>& u) {
    const Packet<S> f = u.tape.activation(0, u.n), g = u.tape.activation(1, u.n);
    return pmadd(f, psub(u.c_before.value(u.n), g), g);
  }

  template <bool peepholes = false>
  static FASTBPTT_INLINE void backward(const Packet<S>& grad_h, const ReverseUnit<S>& u) {
    const Packet<S> f = u.tape.activation(0, u.n), g = u.tape.activation(1, u.n),
                    o = u.tape.activation(2, u.n);
    lstm_backward<LstmCoupledCell, peepholes>(grad_h, {one_minus<S>(f), f, g, o, u.c.value(u.n)},
                                              u);
  }

  template <bool peepholes>
  static FASTBPTT_INLINE void gates_back(const LstmGates<S>& a, const Packet<S>& before,
                                         const Packet<S>& grad_c, const Packet<S>& s_o,
                                         const ReverseUnit<S>& u) {
    constexpr Index p = lanes<S>;
    Packet<S> c = grad_c;
    if constexpr (peepholes) c = peep_back(u, 1, s_o, a.c, c);
    const Packet<S> through_f = pmul(c, a.f);
    const Packet<S> s_f = pmul(pmul(through_f, psub(before, a.g)), one_minus<S>(a.f));
    store(u.grads, s_f);
    store(u.grads + p, pmul(psub(c, through_f), one_minus<S>(pmul(a.g, a.g))));
    store(u.grads + 2 * p, s_o);
    Packet<S> carry = through_f;
    if constexpr (peepholes) carry = peep_back(u, 0, s_f, before, carry);
    store(u.carry_c, carry, u.n);
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
