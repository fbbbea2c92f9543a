// The layer kernels of the table: the cell is chosen at run time, once a call.
#pragma once
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/normalised.h"
#include "cells/rnn.h"
#include "kernels/layer_forward.h"
#include "kernels/layer_reverse.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S, class Cell, class F>
auto with_norm(const LayerShape& shape, F&& body) {
  return shape.options.layer_norm ? body(NormalisedCell<S, Cell>{}) : body(Cell{});
}

template <class S, class F>
auto with_cell(const LayerShape& shape, F&& body) {
  switch (shape.cell) {
    case Cell::rnn_relu:
      return body(RnnCell<S, true>{});
    case Cell::lstm:
      return with_norm<S, LstmCell<S>>(shape, body);
    case Cell::lstm_coupled:
      return with_norm<S, LstmCoupledCell<S>>(shape, body);
    case Cell::gru:
      return with_norm<S, GruCell<S>>(shape, body);
    case Cell::gru_reset_before:
      return body(GruResetBeforeCell<S>{});
    default:
      return body(RnnCell<S, false>{});
  }
}

template <class S>
constexpr LayerKernels<S> layer_kernels() {
  return {
      [](const LayerShape& s) {
        return with_cell<S>(s,
                            [&](auto cell) { return ForwardLayer<S, decltype(cell)>::packed(s); });
      },
      [](const LayerShape& s, const Weights<const S>& w, S* packed) {
        with_cell<S>(s, [&](auto cell) { ForwardLayer<S, decltype(cell)>::pack(s, w, packed); });
      },
      [](const LayerShape& s, Index steps, Index batch, int team) {
        return with_cell<S>(s, [&](auto cell) {
          return ForwardLayer<S, decltype(cell)>::scratch(s, steps, batch, team);
        });
      },
      [](const ForwardJob<S>& job) {
        with_cell<S>(job.shape, [&](auto cell) { ForwardLayer<S, decltype(cell)>::run(job); });
      },
      [](const LayerShape& s) {
        return with_cell<S>(s,
                            [&](auto cell) { return ReverseLayer<S, decltype(cell)>::packed(s); });
      },
      [](const LayerShape& s, const Weights<const S>& w, S* packed) {
        with_cell<S>(s, [&](auto cell) { ReverseLayer<S, decltype(cell)>::pack(s, w, packed); });
      },
      [](const LayerShape& s, Index steps, Index batch, int team) {
        return with_cell<S>(s, [&](auto cell) {
          return ReverseLayer<S, decltype(cell)>::scratch(s, steps, batch, team);
        });
      },
      [](const LayerShape& s, S* scratch) {
        with_cell<S>(s, [&](auto cell) { ReverseLayer<S, decltype(cell)>::begin(s, scratch); });
      },
      [](const ReverseJob<S>& job) {
        with_cell<S>(job.shape, [&](auto cell) { ReverseLayer<S, decltype(cell)>::run(job); });
      },
      [](const LayerShape& s, const S* scratch, bool add, const Weights<S>& grad) {
        with_cell<S>(
            s, [&](auto cell) { ReverseLayer<S, decltype(cell)>::finish(s, scratch, add, grad); });
      },
      [](std::uint64_t key, const Place& place, double p, S kept, Index n, S* mask) {
        draw_mask(key, place, p, kept, n, mask);
      },
  };
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
