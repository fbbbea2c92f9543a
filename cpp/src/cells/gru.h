// GRU (Cho et al. 2014), in its two forms.
//
//   r, z = s(a + u),  h = (1 - z) n + z h'
//   reset after (PyTorch, cuDNN):  n = tanh(a_n + r u_n)
//   reset before (the paper):      n = tanh(a_n + W_hn (r h') + b_hn)
#pragma once
#include "cells/unit.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// Panel: a_n, r, z, u_n of the same hidden units, so that the input product fills the first three
// and the recurrent product the last three. Tape: r, z, n, u_n.
template <class S>
struct GruCell {
  static constexpr bool wide = false;
  static constexpr Second second = Second::none;
  static constexpr bool carries_h = true;
  static constexpr bool has_c = false;
  static constexpr int packets = 4;
  static constexpr int x_first = 0, x_count = 3, h_first = 1, h_count = 3;
  static constexpr int gate[] = {2, 0, 1, 2};
  static constexpr int tape = 4;

  static FASTBPTT_INLINE void forward(const S* sums, const ForwardUnit<S>& u) {
    constexpr Index p = lanes<S>;
    const Packet<S> r = logistic<S>(load(sums + p)), z = logistic<S>(load(sums + 2 * p)),
                    u_n = load(sums + 3 * p);
    const Packet<S> n = tanh_of(pmadd(r, u_n, load(sums)));
    store(u.h, pmadd(z, psub(load(u.h_before, u.n), n), n), u.n);
    if (!u.tape) return;
    u.tape.keep_activation(0, r, u.n);
    u.tape.keep_activation(1, z, u.n);
    u.tape.keep_activation(2, n, u.n);
    u.tape.keep(3, u_n, u.n);
  }

  static FASTBPTT_INLINE void backward(const Packet<S>& grad_h, const ReverseUnit<S>& u) {
    constexpr Index p = lanes<S>;
    const Packet<S> r = u.tape.activation(0, u.n), z = u.tape.activation(1, u.n),
                    n = u.tape.activation(2, u.n), u_n = u.tape.value(3, u.n);
    const Packet<S> through_z = pmul(grad_h, z);
    const Packet<S> grad_n = pmul(psub(grad_h, through_z), one_minus<S>(pmul(n, n)));
    const Packet<S> grad_u = pmul(grad_n, r);
    store(u.grads, grad_n);
    store(u.grads + p, pmul(pmul(grad_u, u_n), one_minus<S>(r)));
    store(u.grads + 2 * p, pmul(pmul(through_z, psub(load(u.h_before, u.n), n)), one_minus<S>(z)));
    store(u.grads + 3 * p, grad_u);
    store(u.carry_h, through_z, u.n);
  }
};

// The recurrent product of n waits for r, so a step has two phases, the gates and the candidate,
// and its reverse the same two in the other order. Panel: n, r, z. Tape: r, z, n.
template <class S>
struct GruResetBeforeCell {
  static constexpr bool wide = false;
  static constexpr Second second = Second::candidate;
  static constexpr bool carries_h = true;
  static constexpr bool has_c = false;
  static constexpr int packets = 3;
  static constexpr int x_first = 0, x_count = 3, h_first = 1, h_count = 2;
  static constexpr int gate[] = {2, 0, 1};
  static constexpr int tape = 3;

  // The sum of n so far goes to `candidate`, r h' to `reset`.
  static FASTBPTT_INLINE void forward_gates(const S* sums, const ForwardUnit<S>& u, S* candidate,
                                            S* reset) {
    constexpr Index p = lanes<S>;
    const Packet<S> r = logistic<S>(load(sums + p)), z = logistic<S>(load(sums + 2 * p));
    store(candidate, load(sums));
    store(reset, pmul(r, load(u.h_before, u.n)), u.n);
    store(u.z, z, u.n);
    if (u.tape) u.tape.keep_activation(0, r, u.n);
  }
  static FASTBPTT_INLINE void forward_candidate(const S* sum, const ForwardUnit<S>& u) {
    const Packet<S> z = load(u.z, u.n), n = tanh_of(load(sum));
    store(u.h, pmadd(z, psub(load(u.h_before, u.n), n), n), u.n);
    if (!u.tape) return;
    u.tape.keep_activation(1, z, u.n);
    u.tape.keep_activation(2, n, u.n);
  }

  // The gradient of n's sum also goes to `grad_sum`, r h' again to `reset`.
  static FASTBPTT_INLINE void backward_candidate(const Packet<S>& grad_h, const ReverseUnit<S>& u,
                                                 S* grad_sum, S* reset) {
    constexpr Index p = lanes<S>;
    const Packet<S> r = u.tape.activation(0, u.n), z = u.tape.activation(1, u.n),
                    n = u.tape.activation(2, u.n), before = load(u.h_before, u.n);
    const Packet<S> through_z = pmul(grad_h, z);
    const Packet<S> grad_n = pmul(psub(grad_h, through_z), one_minus<S>(pmul(n, n)));
    store(u.grads, grad_n);
    store(grad_sum, grad_n);
    store(u.grads + 2 * p, pmul(pmul(through_z, psub(before, n)), one_minus<S>(z)));
    store(u.carry_h, through_z, u.n);
    store(reset, pmul(r, before), u.n);
  }
  // grad_reset: dL/d(r h')
  static FASTBPTT_INLINE void backward_gates(const Packet<S>& grad_reset, const ReverseUnit<S>& u) {
    constexpr Index p = lanes<S>;
    const Packet<S> r = u.tape.activation(0, u.n), before = load(u.h_before, u.n);
    const Packet<S> through_r = pmul(grad_reset, r);
    store(u.grads + p, pmul(pmul(through_r, before), one_minus<S>(r)));
    store(u.carry_h, padd(load(u.carry_h, u.n), through_r), u.n);
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
