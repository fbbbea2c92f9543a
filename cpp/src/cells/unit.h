// What the arithmetic of a cell sees: one packet of hidden units of one batch row at one step.
#pragma once
#include "cells/tape.h"
#include "kernels/activations.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// The product that a step makes of what its cell has computed, beside those of x and h'. A
// projection is one that a layer may have or not.
enum class Second { none, candidate, projection };

// The peepholes of these units, one run of n a gate, `row` apart; data null: there are none.
template <class S>
struct Peephole {
  S* data = nullptr;
  Index row = 0;
  FASTBPTT_INLINE S* at(Index gate) const { return data + gate * row; }
};

// n valid lanes; every pointer is to n values. Members have values of their own, as GCC clears a
// whole unit with a string instruction, which takes longer than half a tanh.
template <class S>
struct ForwardUnit {
  Index n = 0;
  const S* h_before = nullptr;  // h'
  S* h = nullptr;               // written; with a projection what it takes, and h_before is null
  S* c = nullptr;               // c' in, c out; LSTM only
  S* z = nullptr;  // what the gates leave for the candidate; GRU that resets before only
  TapeUnit<S> tape;
  Peephole<const S> peephole;
};

template <class S>
struct ReverseUnit {
  Index n = 0;
  const S* h_before = nullptr;
  TapeRun<S> c_before;
  const S* h = nullptr;
  TapeUnit<const S> tape;
  TapeRun<S> c;          // the c that went through tanh; LSTM only
  S* carry_h = nullptr;  // out: dL/dh' apart from what comes through W_hh; null with a projection
  S* carry_c = nullptr;  // dL/dc in, dL/dc' out
  S* grads = nullptr;    // out: dL/d(sums), whole packets in panel order; lanes beyond n zero
  S* output = nullptr;   // out: what the projection took; null without
  Peephole<const S> peephole;
  Peephole<S> grad_peephole;  // added to; data null: not wanted
};

template <class S>
FASTBPTT_INLINE Packet<S> one_minus(const Packet<S>& x) {
  return psub(constant<S>(1), x);
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
