// The product that some cells make of their own values, behind those of x and h': the candidate of
// a GRU that resets before, W_hn (r h'), and the projection of an LSTM, W_hr (o tanh(c)). Where a
// layer has none, it has no size.
#pragma once
#include "cells/unit.h"
#include "kernels/panels.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// N = H or P outputs from H inputs.
template <class S, class Cell>
struct SecondProduct {
  static constexpr Index p = lanes<S>;
  using P = Panels<S, ProductPanel>;
  P panels;
  bool exists;

  explicit SecondProduct(const LayerShape& s)
      : panels({s.cell, s.hidden_size,
                Cell::second == Second::projection ? s.proj_size : s.hidden_size}),
        exists(Cell::second == Second::candidate ||
               (Cell::second == Second::projection && s.proj_size > 0)) {}

  // Whether what the cell makes is not h but what is projected.
  FASTBPTT_INLINE bool projects() const { return Cell::second == Second::projection && exists; }

  template <class T>
  T* weight(const Weights<T>& w) const {
    return Cell::second == Second::projection ? w.w_hr
                                              : w.w_hh + Cell::gate[0] * panels.I * panels.I;
  }

  Index count() const { return exists ? panels.count() : 0; }
  // Of packed weights, and of their gradient.
  Index size() const { return exists ? panels.size() : 0; }
  void pack(const Weights<const S>& w, S* to) const {
    for (Index j = 0; j < count(); ++j) {
      panels.pack(weight(w), panels.I, j, all_packets, panels.x(to, j));
    }
  }
  void unpack(const S* gradient, bool add, const Weights<S>& grad) const {
    for (Index j = 0; j < count(); ++j) {
      panels.unpack(panels.x(gradient, j), panels.I, j, all_packets, add, weight(grad));
    }
  }
  Index reverse_size() const { return exists ? panels.reverse_size(panels.I, all_packets) : 0; }
  void pack_reverse(const Weights<const S>& w, S* to) const {
    if (exists) panels.pack_reverse(weight(w), panels.I, all_packets, to);
  }
  // Values of a row of inputs, and of a row of sums.
  Index input_row() const { return exists ? ceil_div(panels.I, p) * p : 0; }
  Index sums_row() const { return exists ? panels.count() * 4 * p : 0; }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
