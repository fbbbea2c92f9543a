// The influence of a parameter on its own unit alone.
//
// SnAp-1 (Menick et al. 2020) keeps of the influence what one step makes of it: a parameter of a
// gate reaches the unit of the gate, and D is taken at this unit, h and c of an LSTM together.
// The eligibility traces of e-prop (Bellec et al. 2020) leave out of D what goes through the
// recurrent weights, so that in an LSTM only the way from c to c is left.
#pragma once
#include "online/cell_derivatives.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// The diagonal of the derivatives of h and c by h'.
template <class S>
void recurrent_diagonal(const OnlineLayer<S>& layer, const Derivatives<S>& d, const S* w_hh, S* h,
                        S* c) {
  const Index H = layer.H;
  const bool before = layer.cell == Cell::gru_reset_before;
  for (Index j = 0; j < H; ++j) {
    h[j] = d.own[j];
    S of_c = 0;
    for (Index q = before ? 1 : 0; q < (before ? 2 : layer.G); ++q) {
      const S weight = w_hh[(q * H + j) * H + j];
      h[j] += d.h_by_h[q * H + j] * weight;
      if (c) of_c += d.c_by[q * H + j] * weight;
    }
    if (c) c[j] = of_c;
    if (!before) continue;
    const S* const w_hn = w_hh + (2 * H + j) * H;
    S sum = w_hn[j] * d.reset[j];
    for (Index m = 0; m < H; ++m) sum += w_hn[m] * d.slope[m] * w_hh[m * H + j];
    h[j] += d.h_by_h[2 * H + j] * sum;
  }
}

template <class S>
void online_trace(const TraceJob<S>& job) {
  const OnlineLayer<S> layer(job.shape, job.weights);
  const Index H = layer.H, C = layer.C;
  const Derivatives<S>& d = job.d;
  S* const of_h = job.scratch;
  S* const of_c = job.scratch + H;
  if (job.moved) {
    if (job.recurrent) {
      recurrent_diagonal(layer, d, job.weights.w_hh, of_h, job.c ? of_c : nullptr);
    } else {
      clear(2 * H, of_h);
    }
  }
  for (Index row = 0; row < layer.G * H; ++row) {
    const Index j = row % H;
    S* const h = job.h + row * C;
    if (job.moved) {
      const S* const input = input_of(layer, d, row / H);
      for (Index side = 0; side < 2; ++side) {
        const Index begin = side ? layer.x_side : 0, end = side ? C : layer.x_side;
        const S direct = (side ? d.h_by_h : d.h_by_x)[row], h_by_h = of_h[j];
        if (job.c) {
          S* const c = job.c + row * C;
          const S h_by_c = d.through_c[j], c_by_h = of_c[j], keep = d.keep[j];
          const S direct_c = d.c_by[row];
#pragma GCC ivdep
          for (Index k = begin; k < end; ++k) {
            const S h_before = h[k], c_before = c[k];
            h[k] = h_by_h * h_before + h_by_c * c_before + direct * input[k];
            c[k] = c_by_h * h_before + keep * c_before + direct_c * input[k];
          }
        } else {
#pragma GCC ivdep
          for (Index k = begin; k < end; ++k) h[k] = h_by_h * h[k] + direct * input[k];
        }
      }
    }
    if (job.grad_h && job.grad_h[j] != 0) add_scaled(C, job.grad_h[j], h, job.grads + row * C);
  }
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
