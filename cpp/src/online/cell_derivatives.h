// One step of one stream, and what the state and the sums before it do to the state after it.
// The formulas are those of cells/; here no tape is kept for later, so the derivatives are made at
// once.
#pragma once
#include "kernels/activations.h"
#include "kernels/direct_product.h"
#include "online/online_kernels.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// Sizes that all rules share.
template <class S>
struct OnlineLayer {
  explicit OnlineLayer(const LayerShape& s, const Weights<const S>& w)
      : cell(s.cell),
        I(s.input_size),
        H(s.hidden_size),
        G(gates(s.cell)),
        bias(w.b_ih ? 1 : 0),
        x_side(I + bias),
        C(x_side + H + bias) {}
  Cell cell;
  Index I, H, G;
  Index bias;
  Index x_side;  // parameters of a row that the input side has
  Index C;
};

template <class S>
void affine(const S* weight, const S* bias, Index N, Index K, const S* in, S* out) {
  constexpr Index p = lanes<S>;
  for (Index first = 0; first < N; first += p) {
    const Index n = N - first < p ? N - first : p;
    const Packet<S> sum = dots(weight + first * K, n, in, K);
    store(out + first, bias ? padd(sum, load(bias + first, n)) : sum, n);
  }
}

// In place, in whole packets.
template <class S>
void logistic_all(S* values, Index n) {
  for (Index i = 0; i < n; i += lanes<S>) store(values + i, logistic<S>(load(values + i)));
}
template <class S>
void tanh_all(S* values, Index n) {
  for (Index i = 0; i < n; i += lanes<S>) store(values + i, tanh_of(load(values + i)));
}

template <class S>
void copy_to(Index n, const S* from, S* to) {
  for (Index i = 0; i < n; ++i) to[i] = from[i];
}

template <class S>
void lstm_step(const StepJob<S>& job, S* z) {
  const Index H = job.shape.hidden_size;
  const Derivatives<S>& d = job.d;
  const S* const before = job.before.c;
  S* const c = job.after.c;
  // The o gate waits in place of h, so that whole packets may be written past the end of g.
  copy_to(H, z + 3 * H, job.after.h);
  logistic_all(job.after.h, H);
  copy_to(H, z + 2 * H, d.own);
  tanh_all(d.own, H);
  logistic_all(z, 2 * H);
  for (Index j = 0; j < H; ++j) {
    const S i = z[j], f = z[H + j], g = d.own[j];
    c[j] = f * before[j] + i * g;
    d.c_by[j] = g * i * (1 - i);
    d.c_by[H + j] = before[j] * f * (1 - f);
    d.c_by[2 * H + j] = i * (1 - g * g);
    d.c_by[3 * H + j] = 0;
    d.keep[j] = f;
  }
  copy_to(H, c, z);
  tanh_all(z, H);
  for (Index j = 0; j < H; ++j) {
    const S o = job.after.h[j], t = z[j], by_c = o * (1 - t * t);
    job.after.h[j] = o * t;
    for (Index q = 0; q < 3; ++q) d.h_by_x[q * H + j] = by_c * d.c_by[q * H + j];
    d.h_by_x[3 * H + j] = t * o * (1 - o);
    d.through_c[j] = by_c * d.keep[j];
    d.own[j] = 0;
  }
  copy_to(4 * H, d.h_by_x, d.h_by_h);
}

// h = n + z (h' - n), and what all forms of the GRU have in common; r, z, n are done.
template <class S>
void gru_end(const StepJob<S>& job, const S* z, const S* n) {
  const Index H = job.shape.hidden_size;
  const Derivatives<S>& d = job.d;
  for (Index j = 0; j < H; ++j) {
    const S away = job.before.h[j] - n[j];
    job.after.h[j] = n[j] + z[j] * away;
    d.own[j] = z[j];
    d.h_by_x[H + j] = d.h_by_h[H + j] = away * z[j] * (1 - z[j]);
    d.h_by_x[2 * H + j] = (1 - z[j]) * (1 - n[j] * n[j]);
  }
}

template <class S>
void gru_step(const StepJob<S>& job, S* a, const S* u) {
  const Index H = job.shape.hidden_size;
  const Derivatives<S>& d = job.d;
  S* const n = job.after.h;
  for (Index j = 0; j < 2 * H; ++j) d.h_by_h[j] = a[j] + u[j];
  logistic_all(d.h_by_h, 2 * H);
  for (Index j = 0; j < H; ++j) n[j] = a[2 * H + j] + d.h_by_h[j] * u[2 * H + j];
  tanh_all(n, H);
  copy_to(2 * H, d.h_by_h, a);
  const S* const r = a;
  copy_to(H, n, a + 2 * H);
  gru_end(job, a + H, a + 2 * H);
  for (Index j = 0; j < H; ++j) {
    const S by_n = d.h_by_x[2 * H + j];
    d.h_by_x[j] = d.h_by_h[j] = by_n * u[2 * H + j] * r[j] * (1 - r[j]);
    d.h_by_h[2 * H + j] = by_n * r[j];
  }
}

// r of unit k reaches every unit at once, through W_hn; h_by_x has what it does to unit k.
template <class S>
void gru_reset_before_step(const StepJob<S>& job, S* a, const S* u) {
  const Index H = job.shape.hidden_size, bias = job.weights.b_hh ? 1 : 0;
  const Derivatives<S>& d = job.d;
  const S* const w_hn = job.weights.w_hh + 2 * H * H;
  S* const n = job.after.h;
  for (Index j = 0; j < 2 * H; ++j) d.h_by_h[j] = a[j] + u[j];
  logistic_all(d.h_by_h, 2 * H);
  copy_to(2 * H, d.h_by_h, a);
  copy_to(H, a, d.reset);
  S* const reset_h = d.candidate + job.shape.input_size + bias;
  for (Index j = 0; j < H; ++j) {
    reset_h[j] = d.reset[j] * job.before.h[j];
    d.slope[j] = reset_h[j] * (1 - d.reset[j]);
  }
  affine(w_hn, job.weights.b_hh ? job.weights.b_hh + 2 * H : nullptr, H, H, reset_h, n);
  for (Index j = 0; j < H; ++j) n[j] += a[2 * H + j];
  tanh_all(n, H);
  copy_to(H, n, a + 2 * H);
  gru_end(job, a + H, a + 2 * H);
  for (Index j = 0; j < H; ++j) {
    const S by_n = d.h_by_x[2 * H + j];
    d.h_by_h[2 * H + j] = by_n;
    d.h_by_x[j] = d.h_by_h[j] = by_n * w_hn[j * H + j] * d.slope[j];
  }
}

template <class S>
void rnn_step(const StepJob<S>& job, const S* z) {
  const Index H = job.shape.hidden_size;
  const Derivatives<S>& d = job.d;
  S* const h = job.after.h;
  copy_to(H, z, h);
  if (job.shape.cell == Cell::rnn_relu) {
    for (Index j = 0; j < H; ++j) {
      h[j] = h[j] < 0 ? S(0) : h[j];
      d.h_by_x[j] = h[j] > 0 ? S(1) : S(0);
    }
  } else {
    tanh_all(h, H);
    for (Index j = 0; j < H; ++j) d.h_by_x[j] = 1 - h[j] * h[j];
  }
  for (Index j = 0; j < H; ++j) d.own[j] = 0;
  copy_to(H, d.h_by_x, d.h_by_h);
}

template <class S>
void online_step(const StepJob<S>& job) {
  const OnlineLayer<S> layer(job.shape, job.weights);
  const Index I = layer.I, H = layer.H, rows = layer.G * H;
  const bool before = layer.cell == Cell::gru_reset_before;
  S* const a = job.scratch;
  S* const u = a + rows;
  affine(job.weights.w_ih, job.weights.b_ih, rows, I, job.x, a);
  affine(job.weights.w_hh, job.weights.b_hh, before ? 2 * H : rows, H, job.before.h, u);
  S* const input = job.d.input;
  copy_to(I, job.x, input);
  copy_to(H, job.before.h, input + layer.x_side);
  if (layer.bias) input[I] = input[layer.C - 1] = 1;
  if (before) copy_to(layer.C, input, job.d.candidate);
  switch (layer.cell) {
    case Cell::gru:
      return gru_step(job, a, u);
    case Cell::gru_reset_before:
      return gru_reset_before_step(job, a, u);
    default:
      break;
  }
  for (Index j = 0; j < rows; ++j) a[j] += u[j];
  layer.cell == Cell::lstm ? lstm_step(job, a) : rnn_step(job, a);
}

// What the parameters of gate q were multiplied with.
template <class S>
const S* input_of(const OnlineLayer<S>& layer, const Derivatives<S>& d, Index q) {
  return layer.cell == Cell::gru_reset_before && q == 2 ? d.candidate : d.input;
}

// to += factor * from
template <class S>
void add_scaled(Index n, S factor, const S* from, S* to) {
  for (Index i = 0; i < n; ++i) to[i] += factor * from[i];
}

template <class S>
void clear(Index n, S* to) {
  for (Index i = 0; i < n; ++i) to[i] = 0;
}

// out [H, K] += the sum over gates of diag(by) W, W [G*H, K]; of the gates [first, last).
template <class S>
void add_gates(const OnlineLayer<S>& layer, Index first, Index last, const S* by, const S* weight,
               Index K, S* out) {
  const Index H = layer.H;
  for (Index j = 0; j < H; ++j) {
    for (Index q = first; q < last; ++q) {
      const Index row = q * H + j;
      if (by[row] != 0) add_scaled(K, by[row], weight + row * K, out + j * K);
    }
  }
}

// out [H, K] += diag(dh/dn) W_hn inner, inner [H, K]: what goes through the reset of the GRU that
// has it before the product.
template <class S>
void add_through_reset(const OnlineLayer<S>& layer, const Derivatives<S>& d, const S* w_hh,
                       const S* inner, Index K, S* out) {
  const Index H = layer.H;
  const S* const w_hn = w_hh + 2 * H * H;
  for (Index j = 0; j < H; ++j) {
    const S by_n = d.h_by_h[2 * H + j];
    for (Index m = 0; m < H; ++m) {
      add_scaled(K, by_n * w_hn[j * H + m], inner + m * K, out + j * K);
    }
  }
}

template <class S>
void online_jacobian(const JacobianJob<S>& job) {
  const OnlineLayer<S> layer(job.shape, job.weights);
  const Index H = layer.H, I = layer.I, G = layer.G;
  const Derivatives<S>& d = job.d;
  const S *const w_hh = job.weights.w_hh, *const w_ih = job.weights.w_ih;
  const bool lstm = layer.cell == Cell::lstm, before = layer.cell == Cell::gru_reset_before;
  S* const of_h = job.jacobian + (lstm ? H * H : 0);
  if (lstm) {
    clear(H * H, job.jacobian);
    add_gates(layer, 0, 3, d.c_by, w_hh, H, job.jacobian);
  }
  clear(H * H, of_h);
  if (before) {
    for (Index m = 0; m < H; ++m) {
      for (Index k = 0; k < H; ++k) job.scratch[m * H + k] = d.slope[m] * w_hh[m * H + k];
      job.scratch[m * H + m] += d.reset[m];
    }
    add_gates(layer, 1, 2, d.h_by_h, w_hh, H, of_h);
    add_through_reset(layer, d, w_hh, job.scratch, H, of_h);
  } else {
    add_gates(layer, 0, G, d.h_by_h, w_hh, H, of_h);
  }
  for (Index j = 0; j < H; ++j) of_h[j * H + j] += d.own[j];
  if (!job.embedded) return;
  S* const by_x = job.embedded + (lstm ? H * I : 0);
  if (lstm) {
    clear(H * I, job.embedded);
    add_gates(layer, 0, 3, d.c_by, w_ih, I, job.embedded);
  }
  clear(H * I, by_x);
  add_gates(layer, before ? 1 : 0, G, d.h_by_x, w_ih, I, by_x);
  if (before) {
    for (Index m = 0; m < H; ++m) {
      for (Index k = 0; k < I; ++k) job.scratch[m * I + k] = d.slope[m] * w_ih[m * I + k];
    }
    add_through_reset(layer, d, w_hh, job.scratch, I, by_x);
  }
}

// The error of the sums of all gates, from the errors of h and c after the step: x_side [G*H] and
// h_side [G*H]; either may be null.
template <class S>
void pull_to_gates(const OnlineLayer<S>& layer, const Derivatives<S>& d, const S* w_hh,
                   const S* grad_h, const S* grad_c, S* x_side, S* h_side) {
  const Index H = layer.H;
  for (Index q = 0; q < layer.G; ++q) {
    for (Index j = 0; j < H; ++j) {
      const Index row = q * H + j;
      const S by_c = grad_c ? grad_c[j] * d.c_by[row] : S(0);
      if (x_side) x_side[row] = grad_h[j] * d.h_by_x[row] + by_c;
      if (h_side) h_side[row] = grad_h[j] * d.h_by_h[row] + by_c;
    }
  }
  if (layer.cell != Cell::gru_reset_before) return;
  for (Index k = 0; k < H; ++k) {
    S sum = 0;
    for (Index j = 0; j < H; ++j) {
      sum += grad_h[j] * d.h_by_h[2 * H + j] * w_hh[(2 * H + j) * H + k];
    }
    if (x_side) x_side[k] = sum * d.slope[k];
    if (h_side) h_side[k] = sum * d.slope[k];
  }
}

template <class S>
void add_input_gradient(const InputJob<S>& job) {
  const OnlineLayer<S> layer(job.shape, job.weights);
  pull_to_gates<S>(layer, job.d, job.weights.w_hh, job.grad_h, nullptr, job.scratch, nullptr);
  for (Index row = 0; row < layer.G * layer.H; ++row) {
    add_scaled(layer.I, job.scratch[row], job.weights.w_ih + row * layer.I, job.grads);
  }
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
