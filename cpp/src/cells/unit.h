// What the arithmetic of a cell sees: one packet of hidden units of one batch row at one step.
#pragma once
#include "kernels/activations.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// n valid lanes; every pointer is to n values, a tape to several runs of n one after another.
template <class S>
struct ForwardUnit {
  Index n;
  const S* h_before;  // h'
  S* h;               // written
  S* c;               // c' in, c out; LSTM only
  S* tape;            // null: keep nothing
};

template <class S>
struct ReverseUnit {
  Index n;
  const S* h_before;
  const S* c_before;
  const S* h;
  const S* tape;
  S* carry_h;  // out: dL/dh' apart from what comes through W_hh
  S* carry_c;  // dL/dc in, dL/dc' out
  S* grads;    // out: dL/d(sums), whole packets in panel order; lanes beyond n zero
};

template <class S>
FASTBPTT_INLINE Packet<S> one_minus(const Packet<S>& x) {
  return psub(constant<S>(1), x);
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
