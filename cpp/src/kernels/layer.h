// The layer kernels of the table: the cell is chosen at run time, once a call.
#pragma once
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "kernels/layer_forward.h"
#include "kernels/layer_reverse.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S, class F>
auto with_cell(const LayerShape& shape, F&& body) {
  switch (shape.cell) {
    case Cell::rnn_relu:
      return body(RnnCell<S, true>{});
    case Cell::lstm:
      return shape.proj_size > 0 ? body(LstmProjectedCell<S>{}) : body(LstmCell<S>{});
    case Cell::lstm_coupled:
      return body(LstmCoupledCell<S>{});
    case Cell::gru:
      return body(GruCell<S>{});
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
