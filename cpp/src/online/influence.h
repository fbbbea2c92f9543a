// Real-time recurrent learning (Williams & Zipser 1989): the influence J of every parameter on
// every unit of the state goes forward with the state,
//
//   J = D J' + (the direct influence of this step),    dL/dw = dL/dh J.
//
// The product is nearly all of the work. J lies in panels of four packets of parameters, so that
// it is the panel of multiply_rows, with D in the place of the rows of a batch.
#pragma once
#include "kernels/micro_kernel.h"
#include "online/cell_derivatives.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
constexpr Index influence_width = 4 * lanes<S>;

// The direct influence on the units, of the parameters [first, first + width).
template <class S>
void add_direct(const InfluenceJob<S>& job, const OnlineLayer<S>& layer, Index first, S* h, S* c) {
  constexpr Index width = influence_width<S>;
  const Index H = layer.H, C = layer.C, rows = layer.G * H;
  const Derivatives<S>& d = job.d;
  const Index last = first + width < job.parameters ? first + width : job.parameters;
  Index at = first;
  while (at < last && at < rows * C) {
    const Index row = at / C, column = at - row * C, j = row % H;
    const bool of_x = column < layer.x_side;
    const Index side_end = row * C + (of_x ? layer.x_side : C);
    const Index n = (side_end < last ? side_end : last) - at;
    const S* const input = input_of(layer, d, row / H) + column;
    const Index to = at - first;
    if (layer.cell == Cell::gru_reset_before && row < H) {
      const S* const w_hn = job.weights.w_hh + 2 * H * H;
      for (Index i = 0; i < H; ++i) {
        const S by = d.h_by_h[2 * H + i] * w_hn[i * H + j] * d.slope[j];
        add_scaled(n, by, input, h + i * width + to);
      }
    } else {
      add_scaled(n, (of_x ? d.h_by_x : d.h_by_h)[row], input, h + j * width + to);
      if (c) add_scaled(n, d.c_by[row], input, c + j * width + to);
    }
    at += n;
  }
  if (job.row < 0) return;
  const Index I = layer.I, begin = rows * C + job.row * I, end = begin + I;
  const Index from = begin < first ? first : begin, until = end < last ? end : last;
  if (from >= until) return;
  const S* const of_h = job.embedded + (c ? H * I : 0);
  for (Index i = 0; i < H; ++i) {
    add_scaled<S>(until - from, 1, of_h + i * I + from - begin, h + i * width + from - first);
    if (c) {
      add_scaled<S>(until - from, 1, job.embedded + i * I + from - begin,
                    c + i * width + from - first);
    }
  }
}

template <class S>
void move_panel(const InfluenceJob<S>& job, const OnlineLayer<S>& layer, Index first, S* h, S* c) {
  constexpr Index width = influence_width<S>;
  const Index H = layer.H, units = c ? 2 * H : H;
  S* const sums = job.scratch;
  if (c) {
    for (Index i = 0; i < H; ++i) {
      for (Index k = 0; k < width; ++k) {
        sums[i * width + k] = job.d.keep[i] * c[i * width + k];
        sums[(H + i) * width + k] = job.d.through_c[i] * c[i * width + k];
      }
    }
  } else {
    clear(H * width, sums);
  }
  for_row_tiles(units, 4, [&](Index R, Index row) {
    RowsProduct<S> product(sums + row * width, width, H, h);
    for (Index r = 0; r < R; ++r) product.a[r] = job.jacobian + (row + r) * H;
    multiply_rows(R, 4, false, product);
  });
  if (c) copy_to(H * width, sums, c);
  copy_to(H * width, sums + (units - H) * width, h);
  add_direct(job, layer, first, h, c);
}

template <class S>
void online_influence(const InfluenceJob<S>& job) {
  constexpr Index width = influence_width<S>;
  const OnlineLayer<S> layer(job.shape, job.weights);
  const Index H = layer.H;
  for (Index panel = job.begin; panel < job.end; ++panel) {
    S* const h = job.h + panel * H * width;
    if (job.moved) {
      move_panel(job, layer, panel * width, h, job.c ? job.c + panel * H * width : nullptr);
    }
    if (!job.grad_h) continue;
    S* const grads = job.grads + panel * width;
    for (Index i = 0; i < H; ++i) add_scaled(width, job.grad_h[i], h + i * width, grads);
  }
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
