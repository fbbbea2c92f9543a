#include "reference/reference.h"

#include <cmath>

namespace fastbptt::reference {
namespace {

using Vector = std::vector<double>;

double logistic(double v) { return 1.0 / (1.0 + std::exp(-v)); }

// out[r] += sum_c w[r, c] * v[c]
void add_product(const double* w, std::size_t rows, std::size_t cols, const double* v,
                 double* out) {
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < cols; ++c) out[r] += w[r * cols + c] * v[c];
  }
}

// The backward of add_product with respect to v: out[c] += sum_r d[r] * w[r, c]
void add_transposed_product(const double* w, std::size_t rows, std::size_t cols, const double* d,
                            double* out) {
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < cols; ++c) out[c] += d[r] * w[r * cols + c];
  }
}

// The backward of add_product with respect to w: out[r, c] += d[r] * v[c]
void add_outer(const double* d, std::size_t rows, const double* v, std::size_t cols, double* out) {
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < cols; ++c) out[r * cols + c] += d[r] * v[c];
  }
}

// out[r] += v[r]; a null v stands for zeros.
void add(const double* v, std::size_t rows, double* out) {
  for (std::size_t r = 0; v != nullptr && r < rows; ++r) out[r] += v[r];
}

Vector copy_or_zeros(const double* v, std::size_t n) {
  return v != nullptr ? Vector(v, v + n) : Vector(n, 0.0);
}

// Results of the right size, all zero, with the states at their start: h and c hold the state
// before the first step, grad_h0 and grad_c0 the error of the state after the last.
Result begin(const Problem& p) {
  const std::size_t GH = static_cast<std::size_t>(gates(p.cell)) * p.H;
  Result out;
  out.y.resize(p.T * p.B * p.H);
  out.h = copy_or_zeros(p.h0, p.B * p.H);
  out.grad_x.resize(p.T * p.B * p.I);
  out.grad_h0 = copy_or_zeros(p.grad_h, p.B * p.H);
  out.grad_w_ih.resize(GH * p.I);
  out.grad_w_hh.resize(GH * p.H);
  out.grad_b_ih.resize(GH);
  out.grad_b_hh.resize(GH);
  if (p.cell == Cell::lstm) {
    out.c = copy_or_zeros(p.c0, p.B * p.H);
    out.grad_c0 = copy_or_zeros(p.grad_c, p.B * p.H);
  }
  return out;
}

// RNN (Elman 1990): one gate, f = tanh or relu.
//
//   h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      y_t = h_t
//
//   f' = 1 - h_t^2 for tanh;  1 where h_t > 0 and 0 elsewhere for relu
Result rnn(const Problem& p) {
  const std::size_t T = p.T, B = p.B, I = p.I, H = p.H;
  Result out = begin(p);

  Vector h_prev(T * B * H);  // h_{t-1} of every step
  for (std::size_t t = 0; t < T; ++t) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      Vector s(H);
      add_product(p.w_ih, H, I, &p.x[row * I], s.data());
      add(p.b_ih, H, s.data());
      add_product(p.w_hh, H, H, &out.h[b * H], s.data());
      add(p.b_hh, H, s.data());
      for (std::size_t j = 0; j < H; ++j) {
        h_prev[row * H + j] = out.h[b * H + j];
        // In this form a NaN stays a NaN.
        const double h = p.cell == Cell::rnn_tanh ? std::tanh(s[j]) : (s[j] <= 0.0 ? 0.0 : s[j]);
        out.h[b * H + j] = h;
        out.y[row * H + j] = h;
      }
    }
  }

  for (std::size_t t = T; t-- > 0;) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      double* dh = &out.grad_h0[b * H];
      Vector ds(H);
      for (std::size_t j = 0; j < H; ++j) {
        const double h = out.y[row * H + j];
        const double slope = p.cell == Cell::rnn_tanh ? 1.0 - h * h : (h > 0.0 ? 1.0 : 0.0);
        if (p.grad_y != nullptr) dh[j] += p.grad_y[row * H + j];
        ds[j] = dh[j] * slope;
        dh[j] = 0.0;
      }
      add_transposed_product(p.w_ih, H, I, ds.data(), &out.grad_x[row * I]);
      add_transposed_product(p.w_hh, H, H, ds.data(), dh);
      add_outer(ds.data(), H, &p.x[row * I], I, out.grad_w_ih.data());
      add_outer(ds.data(), H, &h_prev[row * H], H, out.grad_w_hh.data());
      add(ds.data(), H, out.grad_b_ih.data());
      add(ds.data(), H, out.grad_b_hh.data());
    }
  }
  return out;
}

// LSTM (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000): gates i, f, g, o.
//
//   s = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh           4H, sigma the logistic function
//   i = sigma(s_i)   f = sigma(s_f)   g = tanh(s_g)   o = sigma(s_o)
//   c_t = f * c_{t-1} + i * g
//   h_t = o * tanh(c_t)                                 y_t = h_t
//
//   ds_o = dh * tanh(c_t) * o (1 - o)
//   dc  += dh * o * (1 - tanh(c_t)^2)
//   ds_i = dc * g * i (1 - i)   ds_f = dc * c_{t-1} * f (1 - f)   ds_g = dc * i * (1 - g^2)
//   dc_{t-1} = dc * f           dh_{t-1} = W_hh^T ds
Result lstm(const Problem& p) {
  const std::size_t T = p.T, B = p.B, I = p.I, H = p.H;
  Result out = begin(p);

  Vector h_prev(T * B * H), c_prev(T * B * H), c_next(T * B * H);
  Vector i(T * B * H), f(T * B * H), g(T * B * H), o(T * B * H);
  for (std::size_t t = 0; t < T; ++t) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      Vector s(4 * H);
      add_product(p.w_ih, 4 * H, I, &p.x[row * I], s.data());
      add(p.b_ih, 4 * H, s.data());
      add_product(p.w_hh, 4 * H, H, &out.h[b * H], s.data());
      add(p.b_hh, 4 * H, s.data());
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        h_prev[k] = out.h[b * H + j];
        c_prev[k] = out.c[b * H + j];
        i[k] = logistic(s[j]);
        f[k] = logistic(s[H + j]);
        g[k] = std::tanh(s[2 * H + j]);
        o[k] = logistic(s[3 * H + j]);
        c_next[k] = f[k] * c_prev[k] + i[k] * g[k];
        out.c[b * H + j] = c_next[k];
        out.h[b * H + j] = o[k] * std::tanh(c_next[k]);
        out.y[k] = out.h[b * H + j];
      }
    }
  }

  for (std::size_t t = T; t-- > 0;) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      double* dh = &out.grad_h0[b * H];
      double* dc = &out.grad_c0[b * H];
      Vector ds(4 * H);
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        const double tanh_c = std::tanh(c_next[k]);
        if (p.grad_y != nullptr) dh[j] += p.grad_y[k];
        dc[j] += dh[j] * o[k] * (1.0 - tanh_c * tanh_c);
        ds[j] = dc[j] * g[k] * i[k] * (1.0 - i[k]);
        ds[H + j] = dc[j] * c_prev[k] * f[k] * (1.0 - f[k]);
        ds[2 * H + j] = dc[j] * i[k] * (1.0 - g[k] * g[k]);
        ds[3 * H + j] = dh[j] * tanh_c * o[k] * (1.0 - o[k]);
        dc[j] *= f[k];
        dh[j] = 0.0;
      }
      add_transposed_product(p.w_ih, 4 * H, I, ds.data(), &out.grad_x[row * I]);
      add_transposed_product(p.w_hh, 4 * H, H, ds.data(), dh);
      add_outer(ds.data(), 4 * H, &p.x[row * I], I, out.grad_w_ih.data());
      add_outer(ds.data(), 4 * H, &h_prev[row * H], H, out.grad_w_hh.data());
      add(ds.data(), 4 * H, out.grad_b_ih.data());
      add(ds.data(), 4 * H, out.grad_b_hh.data());
    }
  }
  return out;
}

// GRU (Cho et al. 2014) with the reset gate after the product, as PyTorch and cuDNN: gates r, z, n.
//
//   a = W_ih x_t + b_ih   u = W_hh h_{t-1} + b_hh       3H each
//   r = sigma(a_r + u_r)   z = sigma(a_z + u_z)
//   n = tanh(a_n + r * u_n)
//   h_t = (1 - z) * n + z * h_{t-1}                     y_t = h_t
//
//   da_z = dh * (h_{t-1} - n) * z (1 - z)
//   da_n = dh * (1 - z) * (1 - n^2)
//   da_r = da_n * u_n * r (1 - r)
//   du_r = da_r   du_z = da_z   du_n = da_n * r
//   dh_{t-1} = dh * z + W_hh^T du
Result gru(const Problem& p) {
  const std::size_t T = p.T, B = p.B, I = p.I, H = p.H;
  Result out = begin(p);

  Vector h_prev(T * B * H), r(T * B * H), z(T * B * H), n(T * B * H), u_n(T * B * H);
  for (std::size_t t = 0; t < T; ++t) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      Vector a(3 * H), u(3 * H);
      add_product(p.w_ih, 3 * H, I, &p.x[row * I], a.data());
      add(p.b_ih, 3 * H, a.data());
      add_product(p.w_hh, 3 * H, H, &out.h[b * H], u.data());
      add(p.b_hh, 3 * H, u.data());
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        h_prev[k] = out.h[b * H + j];
        u_n[k] = u[2 * H + j];
        r[k] = logistic(a[j] + u[j]);
        z[k] = logistic(a[H + j] + u[H + j]);
        n[k] = std::tanh(a[2 * H + j] + r[k] * u_n[k]);
        out.h[b * H + j] = (1.0 - z[k]) * n[k] + z[k] * h_prev[k];
        out.y[k] = out.h[b * H + j];
      }
    }
  }

  for (std::size_t t = T; t-- > 0;) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      double* dh = &out.grad_h0[b * H];
      Vector da(3 * H), du(3 * H);
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        if (p.grad_y != nullptr) dh[j] += p.grad_y[k];
        da[H + j] = dh[j] * (h_prev[k] - n[k]) * z[k] * (1.0 - z[k]);
        da[2 * H + j] = dh[j] * (1.0 - z[k]) * (1.0 - n[k] * n[k]);
        da[j] = da[2 * H + j] * u_n[k] * r[k] * (1.0 - r[k]);
        du[j] = da[j];
        du[H + j] = da[H + j];
        du[2 * H + j] = da[2 * H + j] * r[k];
        dh[j] *= z[k];
      }
      add_transposed_product(p.w_ih, 3 * H, I, da.data(), &out.grad_x[row * I]);
      add_transposed_product(p.w_hh, 3 * H, H, du.data(), dh);
      add_outer(da.data(), 3 * H, &p.x[row * I], I, out.grad_w_ih.data());
      add_outer(du.data(), 3 * H, &h_prev[row * H], H, out.grad_w_hh.data());
      add(da.data(), 3 * H, out.grad_b_ih.data());
      add(du.data(), 3 * H, out.grad_b_hh.data());
    }
  }
  return out;
}

// GRU with the reset gate before the product, as Cho et al. 2014 wrote it: gates r, z, n, where
// W_hh = (W_hr; W_hz; W_hn) and b_hh = (b_hr; b_hz; b_hn) along the rows.
//
//   a = W_ih x_t + b_ih                                 3H
//   r = sigma(a_r + W_hr h_{t-1} + b_hr)   z = sigma(a_z + W_hz h_{t-1} + b_hz)
//   q = r * h_{t-1}
//   n = tanh(a_n + W_hn q + b_hn)
//   h_t = (1 - z) * n + z * h_{t-1}                     y_t = h_t
//
//   ds_z = dh * (h_{t-1} - n) * z (1 - z)
//   ds_n = dh * (1 - z) * (1 - n^2)                     dq = W_hn^T ds_n
//   ds_r = dq * h_{t-1} * r (1 - r)
//   dh_{t-1} = dh * z + dq * r + W_hr^T ds_r + W_hz^T ds_z
Result gru_reset_before(const Problem& p) {
  const std::size_t T = p.T, B = p.B, I = p.I, H = p.H;
  Result out = begin(p);
  const double* w_hn = p.w_hh + 2 * H * H;
  const double* b_hn = p.b_hh != nullptr ? p.b_hh + 2 * H : nullptr;

  Vector h_prev(T * B * H), r(T * B * H), z(T * B * H), n(T * B * H), q(T * B * H);
  for (std::size_t t = 0; t < T; ++t) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      Vector s(3 * H);
      add_product(p.w_ih, 3 * H, I, &p.x[row * I], s.data());
      add(p.b_ih, 3 * H, s.data());
      add_product(p.w_hh, 2 * H, H, &out.h[b * H], s.data());
      add(p.b_hh, 2 * H, s.data());
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        h_prev[k] = out.h[b * H + j];
        r[k] = logistic(s[j]);
        z[k] = logistic(s[H + j]);
        q[k] = r[k] * h_prev[k];
      }
      add_product(w_hn, H, H, &q[row * H], &s[2 * H]);
      add(b_hn, H, &s[2 * H]);
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        n[k] = std::tanh(s[2 * H + j]);
        out.h[b * H + j] = (1.0 - z[k]) * n[k] + z[k] * h_prev[k];
        out.y[k] = out.h[b * H + j];
      }
    }
  }

  for (std::size_t t = T; t-- > 0;) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      double* dh = &out.grad_h0[b * H];
      Vector ds(3 * H), dq(H);
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        if (p.grad_y != nullptr) dh[j] += p.grad_y[k];
        ds[H + j] = dh[j] * (h_prev[k] - n[k]) * z[k] * (1.0 - z[k]);
        ds[2 * H + j] = dh[j] * (1.0 - z[k]) * (1.0 - n[k] * n[k]);
        dh[j] *= z[k];
      }
      add_transposed_product(w_hn, H, H, &ds[2 * H], dq.data());
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        ds[j] = dq[j] * h_prev[k] * r[k] * (1.0 - r[k]);
        dh[j] += dq[j] * r[k];
      }
      add_transposed_product(p.w_ih, 3 * H, I, ds.data(), &out.grad_x[row * I]);
      add_transposed_product(p.w_hh, 2 * H, H, ds.data(), dh);
      add_outer(ds.data(), 3 * H, &p.x[row * I], I, out.grad_w_ih.data());
      add_outer(ds.data(), 2 * H, &h_prev[row * H], H, out.grad_w_hh.data());
      add_outer(&ds[2 * H], H, &q[row * H], H, &out.grad_w_hh[2 * H * H]);
      add(ds.data(), 3 * H, out.grad_b_ih.data());
      add(ds.data(), 3 * H, out.grad_b_hh.data());
    }
  }
  return out;
}

}  // namespace

int gates(Cell cell) {
  switch (cell) {
    case Cell::rnn_tanh:
    case Cell::rnn_relu:
      return 1;
    case Cell::lstm:
      return 4;
    case Cell::gru:
    case Cell::gru_reset_before:
      return 3;
  }
  return 0;
}

Result run(const Problem& problem) {
  switch (problem.cell) {
    case Cell::rnn_tanh:
    case Cell::rnn_relu:
      return rnn(problem);
    case Cell::lstm:
      return lstm(problem);
    case Cell::gru:
      return gru(problem);
    case Cell::gru_reset_before:
      return gru_reset_before(problem);
  }
  return {};
}

}  // namespace fastbptt::reference
