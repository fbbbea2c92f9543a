// LSTM (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000), one row of one step.
//
//   i, f, o = s(a + u),  g = tanh(a + u),  c = f c' + i g,  h = o tanh(c)
//
// Tape: i, f, g, o, c, each [H].
#pragma once
#include "cells/elementwise.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
struct LstmCell {
  static constexpr Index gates = 4;
  static constexpr bool two_phases = false;
  static constexpr bool splits_gradients = false;
  static constexpr bool needs_h = false;

  // a, u [4H]; c [H] in c', out c -> h [H]; kept [5H]
  static void forward(Index H, const S* a, const S* u, const S*, S* h, S* c, S* kept) {
    MutableRow<S>(kept, 4 * H) = Row<S>(a, 4 * H) + Row<S>(u, 4 * H);
    MutableRow<S> i(kept, H), f(kept + H, H), g(kept + 2 * H, H), o(kept + 3 * H, H);
    logistic_in_place(i);
    logistic_in_place(f);
    g = g.tanh();
    logistic_in_place(o);
    MutableRow<S> cell(c, H);
    cell = f * cell + i * g;
    MutableRow<S>(kept + 4 * H, H) = cell;
    MutableRow<S>(h, H) = o * cell.tanh();
  }

  // gh, gc: dL/dh, dL/dc of this step, in; gh: zero, gc: dL/dc', out. da [4H]: dL/da = dL/du.
  static void backward(Index H, const S* kept, const S*, const S* c_before, const S*, S* gh, S* gc,
                       S* da, S*) {
    const Row<S> i(kept, H), f(kept + H, H), g(kept + 2 * H, H), o(kept + 3 * H, H),
        c(kept + 4 * H, H), before(c_before, H);
    MutableRow<S> grad_h(gh, H), grad_c(gc, H);
    MutableRow<S> di(da, H), df(da + H, H), dg(da + 2 * H, H), d_o(da + 3 * H, H);
    dg = c.tanh();
    d_o = grad_h * dg * o * (S(1) - o);
    grad_c += grad_h * o * (S(1) - dg * dg);
    di = grad_c * g * i * (S(1) - i);
    df = grad_c * before * f * (S(1) - f);
    dg = grad_c * i * (S(1) - g * g);
    grad_c *= f;
    grad_h.setZero();
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
