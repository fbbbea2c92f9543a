// Unbiased online recurrent optimisation (Tallec & Ollivier 2017): in place of the influence J a
// product of two vectors, s w^T, whose mean over random signs v is J:
//
//   s = r0 D s' + r1 v,    w = w' / r0 + (v^T direct influence) / r1
//
// Any r0, r1 > 0 keep the mean; r0 = sqrt(|w'| / |D s'|) and r1 = sqrt(|v^T direct| / |v|) keep the
// variance low.
#pragma once
#include <cmath>

#include "online/cell_derivatives.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// In packets, as a sum in the order of the values would wait for each addition.
template <class S>
double squares(Index n, const S* values) {
  constexpr Index p = lanes<S>, sets = 4;
  Packet<S> sums[sets];
  for (Packet<S>& sum : sums) sum = constant<S>(0);
  Index i = 0;
  for (; i + sets * p <= n; i += sets * p) {
    for (Index s = 0; s < sets; ++s) {
      const Packet<S> value = load(values + i + s * p);
      sums[s] = pmadd(value, value, sums[s]);
    }
  }
  alignas(64) S parts[sets * p];
  for (Index s = 0; s < sets; ++s) store(parts + s * p, sums[s]);
  double sum = 0;
  for (const S part : parts) sum += double(part);
  for (; i < n; ++i) sum += double(values[i]) * double(values[i]);
  return sum;
}

// to = scale * to + factor * from
template <class S>
void scale_and_add(Index n, S scale, S factor, const S* from, S* to) {
  for (Index i = 0; i < n; ++i) to[i] = scale * to[i] + factor * from[i];
}

// s = D s, of h and c. products: G*H and H.
template <class S>
void move_tangent(const OnlineLayer<S>& layer, const Derivatives<S>& d, const S* w_hh, S* h, S* c,
                  S* products) {
  const Index H = layer.H, G = layer.G;
  const bool before = layer.cell == Cell::gru_reset_before;
  S* const inner = products + G * H;
  affine<S>(w_hh, nullptr, before ? 2 * H : G * H, H, h, products);
  if (before) {
    for (Index j = 0; j < H; ++j) inner[j] = d.reset[j] * h[j] + d.slope[j] * products[j];
    affine<S>(w_hh + 2 * H * H, nullptr, H, H, inner, products + 2 * H);
  }
  for (Index j = 0; j < H; ++j) {
    S of_h = d.own[j] * h[j], of_c = 0;
    for (Index q = before ? 1 : 0; q < G; ++q) {
      of_h += d.h_by_h[q * H + j] * products[q * H + j];
      if (c) of_c += d.c_by[q * H + j] * products[q * H + j];
    }
    if (c) {
      of_h += d.through_c[j] * c[j];
      c[j] = of_c + d.keep[j] * c[j];
    }
    h[j] = of_h;
  }
}

inline double ratio(double above, double below) {
  return above > 0 && below > 0 ? std::sqrt(above / below) : 1.0;
}

template <class S>
void move_rank_one(const RankOneJob<S>& job, const OnlineLayer<S>& layer) {
  const Index H = layer.H, C = layer.C, I = layer.I, rows = layer.G * H;
  const Derivatives<S>& d = job.d;
  S* const x_side = job.scratch;
  S* const h_side = x_side + rows;
  S* const embedded = h_side + rows;
  S* const products = embedded + I;
  move_tangent(layer, d, job.weights.w_hh, job.h, job.c, products);
  pull_to_gates<S>(layer, d, job.weights.w_hh, job.signs, job.c ? job.signs + H : nullptr, x_side,
                   h_side);
  double direct = 0;
  for (Index q = 0; q < layer.G; ++q) {
    const S* const input = input_of(layer, d, q);
    direct += squares(H, x_side + q * H) * squares(layer.x_side, input) +
              squares(H, h_side + q * H) * squares(C - layer.x_side, input + layer.x_side);
  }
  if (job.row >= 0) {
    clear(I, embedded);
    for (Index row = 0; row < rows; ++row) {
      add_scaled(I, x_side[row], job.weights.w_ih + row * I, embedded);
    }
    direct += squares(I, embedded);
  }
  const double moved = squares(H, job.h) + (job.c ? squares(H, job.c) : 0);
  const double r0 = ratio(*job.norm, std::sqrt(moved));
  const double r1 = ratio(std::sqrt(direct), std::sqrt(double(job.c ? 2 * H : H)));
  for (Index j = 0; j < H; ++j) {
    job.h[j] = S(r0) * job.h[j] + S(r1) * job.signs[j];
    if (job.c) job.c[j] = S(r0) * job.c[j] + S(r1) * job.signs[H + j];
  }
  const S old = S(1 / r0), fresh = S(1 / r1);
  for (Index row = 0; row < rows; ++row) {
    const S* const input = input_of(layer, d, row / H);
    S* const to = job.parameters + row * C;
    scale_and_add(layer.x_side, old, fresh * x_side[row], input, to);
    scale_and_add(C - layer.x_side, old, fresh * h_side[row], input + layer.x_side,
                  to + layer.x_side);
  }
  for (Index k = rows * C; k < job.size; ++k) job.parameters[k] *= old;
  if (job.row >= 0) add_scaled(I, fresh, embedded, job.parameters + rows * C + job.row * I);
  *job.norm = std::sqrt(squares(job.size, job.parameters));
}

template <class S>
void online_rank_one(const RankOneJob<S>& job) {
  const OnlineLayer<S> layer(job.shape, job.weights);
  if (job.moved) move_rank_one(job, layer);
  if (!job.grad_h) return;
  S error = 0;
  for (Index j = 0; j < layer.H; ++j) error += job.grad_h[j] * job.h[j];
  if (error != 0) add_scaled(job.size, error, job.parameters, job.grads);
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
