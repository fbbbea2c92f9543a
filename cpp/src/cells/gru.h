// GRU (Cho et al. 2014), one row of one step, in its two forms.
//
//   r, z = s(a + u),  h = (1 - z) n + z h'
//   reset after (PyTorch, cuDNN):  n = tanh(a_n + r u_n);                tape r, z, n, u_n
//   reset before (the paper):      n = tanh(a_n + W_hn (r h') + b_hn);   tape r, z, n
//
// The second needs r before its recurrent product is complete, so a step has two phases: gates,
// then candidate; and its reverse the same two in the other order.
#pragma once
#include "cells/elementwise.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
struct GruCell {
  static constexpr Index gates = 3;
  static constexpr bool two_phases = false;
  static constexpr bool splits_gradients = true;
  static constexpr bool needs_h = true;

  // a, u [3H]; h_before [H] -> h [H]; kept [4H]
  static void forward(Index H, const S* a, const S* u, const S* h_before, S* h, S*, S* kept) {
    MutableRow<S>(kept, 2 * H) = Row<S>(a, 2 * H) + Row<S>(u, 2 * H);
    MutableRow<S> r(kept, H), z(kept + H, H), n(kept + 2 * H, H), un(kept + 3 * H, H);
    logistic_in_place(r);
    logistic_in_place(z);
    un = Row<S>(u + 2 * H, H);
    n = (Row<S>(a + 2 * H, H) + r * un).tanh();
    MutableRow<S>(h, H) = n + z * (Row<S>(h_before, H) - n);
  }

  // gh: dL/dh in, dL/dh' apart from what comes through W_hh out. da, du [3H].
  static void backward(Index H, const S* kept, const S* h_before, const S*, const S*, S* gh, S*,
                       S* da, S* du) {
    const Row<S> r(kept, H), z(kept + H, H), n(kept + 2 * H, H), un(kept + 3 * H, H),
        before(h_before, H);
    MutableRow<S> grad(gh, H), dr(da, H), dz(da + H, H), dn(da + 2 * H, H), dun(du + 2 * H, H);
    dn = grad * (S(1) - z) * (S(1) - n * n);
    dz = grad * (before - n) * z * (S(1) - z);
    dr = dn * un * r * (S(1) - r);
    dun = dn * r;
    MutableRow<S>(du, 2 * H) = Row<S>(da, 2 * H);
    grad *= z;
  }
};

template <class S>
struct GruResetBeforeCell {
  static constexpr Index gates = 3;
  static constexpr bool two_phases = true;
  static constexpr bool splits_gradients = false;

  // a, u: the first 2H of [3H] -> kept r, z; rh [H] = r h'
  static void forward_gates(Index H, const S* a, const S* u, const S* h_before, S* kept, S* rh) {
    MutableRow<S> both(kept, 2 * H);
    both = Row<S>(a, 2 * H) + Row<S>(u, 2 * H);
    logistic_in_place(both);
    MutableRow<S>(rh, H) = Row<S>(kept, H) * Row<S>(h_before, H);
  }
  // a, u: the last H of [3H], u from rh -> h
  static void forward_candidate(Index H, const S* a, const S* u, const S* h_before, S* kept, S* h) {
    const Row<S> z(kept + H, H);
    MutableRow<S> n(kept + 2 * H, H);
    n = (Row<S>(a + 2 * H, H) + Row<S>(u + 2 * H, H)).tanh();
    MutableRow<S>(h, H) = n + z * (Row<S>(h_before, H) - n);
  }

  // gh: dL/dh -> the last H of da [3H]; rh [H] = r h' again, for the weight gradient
  static void backward_candidate(Index H, const S* kept, const S* h_before, const S* gh, S* da,
                                 S* rh) {
    const Row<S> r(kept, H), z(kept + H, H), n(kept + 2 * H, H), before(h_before, H);
    MutableRow<S>(da + 2 * H, H) = Row<S>(gh, H) * (S(1) - z) * (S(1) - n * n);
    MutableRow<S>(rh, H) = r * before;
  }
  // drh: dL/d(r h') -> the first 2H of da; gh: dL/dh in, dL/dh' but for W_hr, W_hz out
  static void backward_gates(Index H, const S* kept, const S* h_before, const S* drh, S* gh,
                             S* da) {
    const Row<S> r(kept, H), z(kept + H, H), n(kept + 2 * H, H), before(h_before, H), d(drh, H);
    MutableRow<S> grad(gh, H);
    MutableRow<S>(da, H) = d * before * r * (S(1) - r);
    MutableRow<S>(da + H, H) = grad * (before - n) * z * (S(1) - z);
    grad = grad * z + d * r;
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
