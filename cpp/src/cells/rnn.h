// Vanilla RNN (Elman 1990), one row of one step.
//
//   h = f(a + u),  a = W_ih x + b_ih,  u = W_hh h' + b_hh,  f = tanh or relu
//
// Nothing is kept but h: f'(a + u) is 1 - h^2 for tanh, and 1 where h > 0 for relu.
#pragma once
#include "cells/elementwise.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S, bool Relu>
struct RnnCell {
  static constexpr Index gates = 1;
  static constexpr bool two_phases = false;
  static constexpr bool splits_gradients = false;
  static constexpr bool needs_h = false;

  // a, u [H] -> h [H]
  static void forward(Index H, const S* a, const S* u, const S*, S* h, S*, S*) {
    const Row<S> sum_a(a, H), sum_u(u, H);
    MutableRow<S> out(h, H);
    if constexpr (Relu)
      out = (sum_a + sum_u).cwiseMax(S(0));
    else
      out = (sum_a + sum_u).tanh();
  }

  // gh: dL/dh, in; dL/dh' apart from what comes through W_hh, out (nothing). da: dL/da = dL/du.
  static void backward(Index H, const S*, const S*, const S*, const S* h, S* gh, S*, S* da, S*) {
    const Row<S> value(h, H);
    MutableRow<S> grad(gh, H), out(da, H);
    if constexpr (Relu)
      out = (value > S(0)).select(grad, S(0));
    else
      out = grad * (S(1) - value * value);
    grad.setZero();
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
