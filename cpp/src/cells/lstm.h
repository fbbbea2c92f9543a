// LSTM (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000).
//
//   i, f, o = s(a + u),  g = tanh(a + u),  c = f c' + i g,  h = o tanh(c)
//
// Panel: the packets i, f, g, o of the same hidden units. Tape: i, f, g, o, c.
#pragma once
#include "cells/unit.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
struct LstmCell {
  static constexpr bool wide = false;
  static constexpr bool two_phases = false;
  static constexpr bool carries_h = false;
  static constexpr int packets = 4;
  static constexpr int x_first = 0, x_count = 4, h_first = 0, h_count = 4;
  static constexpr int gate[] = {0, 1, 2, 3};
  static constexpr int tape = 5;
  static constexpr int c_in_tape = 4;

  static FASTBPTT_INLINE void forward(const S* sums, const ForwardUnit<S>& u) {
    constexpr Index p = lanes<S>;
    const Packet<S> i = logistic<S>(load(sums)), f = logistic<S>(load(sums + p)),
                    g = tanh_of(load(sums + 2 * p)), o = logistic<S>(load(sums + 3 * p));
    const Packet<S> c = pmadd(f, load(u.c, u.n), pmul(i, g));
    store(u.c, c, u.n);
    store(u.h, pmul(o, tanh_of(c)), u.n);
    if (!u.tape) return;
    store(u.tape, i, u.n);
    store(u.tape + u.n, f, u.n);
    store(u.tape + 2 * u.n, g, u.n);
    store(u.tape + 3 * u.n, o, u.n);
    store(u.tape + 4 * u.n, c, u.n);
  }

  static FASTBPTT_INLINE void backward(const Packet<S>& grad_h, const ReverseUnit<S>& u) {
    constexpr Index p = lanes<S>;
    const Packet<S> i = load(u.tape, u.n), f = load(u.tape + u.n, u.n),
                    g = load(u.tape + 2 * u.n, u.n), o = load(u.tape + 3 * u.n, u.n);
    const Packet<S> t = tanh_of(load(u.tape + 4 * u.n, u.n));
    const Packet<S> through_o = pmul(grad_h, o);
    const Packet<S> c = pmadd(through_o, one_minus<S>(pmul(t, t)), load(u.carry_c, u.n));
    store(u.grads, pmul(pmul(c, g), pmul(i, one_minus<S>(i))));
    store(u.grads + p, pmul(pmul(c, load(u.c_before, u.n)), pmul(f, one_minus<S>(f))));
    store(u.grads + 2 * p, pmul(pmul(c, i), one_minus<S>(pmul(g, g))));
    store(u.grads + 3 * p, pmul(pmul(through_o, t), one_minus<S>(o)));
    store(u.carry_c, pmul(c, f), u.n);
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
