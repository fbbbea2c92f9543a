// LSTM and GRU with layer normalisation (Ba, Kiros & Hinton 2016, supplement). With the values of
// one row at one step, N(v) = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + 1e-5):
//
//   a = gain_ih N(W_ih x) + b_ih,  u = gain_hh N(W_hh h') + b_hh
//
// The LSTM's products are normalised over all gates, and h = o tanh(gain_c N(c) + shift_c). Those
// of the GRU, which resets after, are over r and z together and over n apart. The rest is the
// cell's own.
//
// Tape: N(W_ih x) and N(W_hh h') in the order of the panel, and c. The gates are computed again.
#pragma once
#include "cells/gru.h"
#include "cells/lstm.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S, class Inner>
struct NormalisedCell : Inner {
  using Plain = Inner;
  static constexpr int tape = Plain::x_count + Plain::h_count + (Plain::has_c ? 1 : 0);
  static constexpr bool of_x(int q) {
    return q >= Plain::x_first && q < Plain::x_first + Plain::x_count;
  }
  static constexpr bool of_h(int q) {
    return q >= Plain::h_first && q < Plain::h_first + Plain::h_count;
  }
  // What a packet of the panel is normalised with: those of the same number.
  static constexpr int groups = Plain::has_c ? 1 : 2;
  static constexpr int group(int q) { return !Plain::has_c && (q == 0 || q == 3) ? 1 : 0; }
  static constexpr int group_size(int g) { return Plain::has_c ? Plain::packets : g == 0 ? 2 : 1; }
};

template <class Cell>
constexpr bool is_normalised = false;
template <class S, class Plain>
constexpr bool is_normalised<NormalisedCell<S, Plain>> = true;

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
