// Vanilla RNN (Elman 1990).
//
//   h = f(a + u),  a = W_ih x + b_ih,  u = W_hh h' + b_hh,  f = tanh or relu
//
// A panel is four packets of hidden units. Nothing is kept but h: f'(a + u) is 1 - h^2 for tanh,
// and 1 where h > 0 for relu.
#pragma once
#include "cells/unit.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S, bool Relu>
struct RnnCell {
  static constexpr bool wide = true;
  static constexpr Second second = Second::none;
  static constexpr bool carries_h = false;
  static constexpr bool has_c = false;
  static constexpr int packets = 4;
  static constexpr int x_first = 0, x_count = 4, h_first = 0, h_count = 4;
  static constexpr int gate[] = {0, 0, 0, 0};
  static constexpr int tape = 0;

  static FASTBPTT_INLINE void forward(const S* sum, const ForwardUnit<S>& u) {
    const Packet<S> s = load(sum);
    if constexpr (Relu) {
      // Not pmax, which may turn NaN into zero.
      store(u.h, pselect(pcmp_lt(s, constant<S>(0)), constant<S>(0), s), u.n);
    } else {
      store(u.h, tanh_of(s), u.n);
    }
  }

  static FASTBPTT_INLINE void backward(const Packet<S>& grad, const ReverseUnit<S>& u) {
    const Packet<S> h = load(u.h, u.n);
    if constexpr (Relu) {
      store(u.grads, pselect(pcmp_lt(constant<S>(0), h), grad, constant<S>(0)));
    } else {
      store(u.grads, pmul(grad, one_minus<S>(pmul(h, h))));
    }
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
