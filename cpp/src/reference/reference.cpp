#include "reference/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

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
  out.kink = std::numeric_limits<double>::infinity();
  out.y.resize(p.T * p.B * p.R());
  out.h = copy_or_zeros(p.h0, p.B * p.R());
  out.grad_x.resize(p.T * p.B * p.I);
  out.grad_h0 = copy_or_zeros(p.grad_h, p.B * p.R());
  out.grad_w_ih.resize(GH * p.I);
  out.grad_w_hh.resize(GH * p.R());
  if (p.w_hr != nullptr) out.grad_w_hr.resize(p.P * p.H);
  out.grad_b_ih.resize(GH);
  out.grad_b_hh.resize(GH);
  out.grad_restart_h.resize(p.R());
  if (has_cell_state(p.cell)) {
    out.c = copy_or_zeros(p.c0, p.B * p.H);
    out.grad_c0 = copy_or_zeros(p.grad_c, p.B * p.H);
    out.cells.resize(p.T * p.B * p.H);
    out.grad_restart_c.resize(p.H);
    out.grad_peephole.resize(static_cast<std::size_t>(gates(p.cell) - 1) * p.H);
  }
  return out;
}

// What the options do around a cell. With k_h and k_c of zoneout (Krueger et al. 2017), m of the
// recurrent dropout (Gal & Ghahramani 2016), and h~, c~ from the cell:
//
//   h', c' = the state of the step before, or, at a reset, that of a new beginning
//   what the products with W_hh see = m * h'
//   h_t = k_h * h' + (1 - k_h) * h~     c_t = k_c * c' + (1 - k_c) * c~
//   h_t = h', c_t = c' where the step is missing
class Around {
 public:
  Around(const Problem& p, Result& out)
      : h_prev(p.T * p.B * p.H),
        c_prev(h_prev.size()),
        seen(h_prev.size()),
        p_(p),
        out_(out),
        has_c_(has_cell_state(p.cell)) {}

  // Of every step, [T, B, H].
  Vector h_prev, c_prev, seen;

  bool missing(std::size_t row) const { return p_.mask != nullptr && !p_.mask[row]; }
  bool reset(std::size_t row) const { return p_.resets != nullptr && p_.resets[row]; }

  // Sets the three; whether there is a step for the cell to make.
  bool begin(std::size_t row) {
    const std::size_t b = row % p_.B;
    for (std::size_t j = 0; j < p_.H; ++j) {
      const std::size_t k = row * p_.H + j, s = b * p_.H + j;
      h_prev[k] = reset(row) ? value(p_.restart_h, j) : out_.h[s];
      if (has_c_) c_prev[k] = reset(row) ? value(p_.restart_c, j) : out_.c[s];
      seen[k] = p_.recurrent_mask != nullptr ? p_.recurrent_mask[s] * h_prev[k] : h_prev[k];
    }
    for (std::size_t j = 0; j < p_.H && missing(row); ++j) {
      const std::size_t k = row * p_.H + j;
      set(row, j, h_prev[k], c_prev[k]);
    }
    return !missing(row);
  }
  // Takes h~ and c~ of one unit.
  void end(std::size_t row, std::size_t j, double h, double c = 0.0) {
    const std::size_t k = row * p_.H + j;
    const double k_h = value(p_.keep_h, k), k_c = value(p_.keep_c, k);
    set(row, j, k_h * h_prev[k] + (1.0 - k_h) * h, k_c * c_prev[k] + (1.0 - k_c) * c);
  }

  // The way back. begin_back gives dL/dh~ and dL/dc~, or false where the step is missing; end_back
  // takes what of h' and c' the cell gives back: dL/dh' apart from the products, dL/d(m h'),
  // dL/dc'.
  bool begin_back(std::size_t row, Vector& dh, Vector& dc) {
    const std::size_t b = row % p_.B;
    past_h_.assign(p_.H, 0.0);
    past_c_.assign(p_.H, 0.0);
    dh.assign(p_.H, 0.0);
    dc.assign(p_.H, 0.0);
    for (std::size_t j = 0; j < p_.H; ++j) {
      const std::size_t k = row * p_.H + j, s = b * p_.H + j;
      const double k_h = missing(row) ? 1.0 : value(p_.keep_h, k);
      const double k_c = missing(row) ? 1.0 : value(p_.keep_c, k);
      const double h = out_.grad_h0[s] + value(p_.grad_y, k);
      past_h_[j] = k_h * h;
      dh[j] = (1.0 - k_h) * h;
      if (!has_c_) continue;
      const double c = out_.grad_c0[s] + value(p_.grad_cells, k);
      past_c_[j] = k_c * c;
      dc[j] = (1.0 - k_c) * c;
    }
    if (missing(row)) end_back(row, Vector(p_.H), Vector(p_.H), Vector(p_.H));
    return !missing(row);
  }
  void end_back(std::size_t row, const Vector& dh, const Vector& d_seen, const Vector& dc) {
    const std::size_t b = row % p_.B;
    for (std::size_t j = 0; j < p_.H; ++j) {
      const std::size_t s = b * p_.H + j;
      const double m = p_.recurrent_mask != nullptr ? p_.recurrent_mask[s] : 1.0;
      give_back(row, past_h_[j] + dh[j] + m * d_seen[j], out_.grad_h0[s], out_.grad_restart_h[j]);
      if (has_c_) give_back(row, past_c_[j] + dc[j], out_.grad_c0[s], out_.grad_restart_c[j]);
    }
  }

 private:
  static double value(const double* v, std::size_t i) { return v != nullptr ? v[i] : 0.0; }
  void set(std::size_t row, std::size_t j, double h, double c) {
    const std::size_t s = row % p_.B * p_.H + j, k = row * p_.H + j;
    out_.h[s] = out_.y[k] = h;
    if (has_c_) out_.c[s] = out_.cells[k] = c;
  }
  void give_back(std::size_t row, double d, double& before, double& restart) const {
    before = reset(row) ? 0.0 : d;
    if (reset(row)) restart += d;
  }

  const Problem& p_;
  Result& out_;
  bool has_c_;
  Vector past_h_, past_c_;
};

// RNN (Elman 1990): one gate, f = tanh or relu.
//
//   h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      y_t = h_t
//
//   f' = 1 - h_t^2 for tanh;  1 where h_t > 0 and 0 elsewhere for relu
Result rnn(const Problem& p) {
  const std::size_t T = p.T, B = p.B, I = p.I, H = p.H;
  Result out = begin(p);
  Around around(p, out);

  Vector h(T * B * H);
  for (std::size_t row = 0; row < T * B; ++row) {
    if (!around.begin(row)) continue;
    Vector s(H);
    add_product(p.w_ih, H, I, &p.x[row * I], s.data());
    add(p.b_ih, H, s.data());
    add_product(p.w_hh, H, H, &around.seen[row * H], s.data());
    add(p.b_hh, H, s.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      out.kink = std::min(out.kink, std::abs(s[j]));
      // In this form a NaN stays a NaN.
      h[k] = p.cell == Cell::rnn_tanh ? std::tanh(s[j]) : (s[j] <= 0.0 ? 0.0 : s[j]);
      around.end(row, j, h[k]);
    }
  }

  for (std::size_t row = T * B; row-- > 0;) {
    Vector dh, dc, ds(H), d_seen(H);
    if (!around.begin_back(row, dh, dc)) continue;
    for (std::size_t j = 0; j < H; ++j) {
      const double v = h[row * H + j];
      ds[j] = dh[j] * (p.cell == Cell::rnn_tanh ? 1.0 - v * v : (v > 0.0 ? 1.0 : 0.0));
    }
    add_transposed_product(p.w_ih, H, I, ds.data(), &out.grad_x[row * I]);
    add_transposed_product(p.w_hh, H, H, ds.data(), d_seen.data());
    add_outer(ds.data(), H, &p.x[row * I], I, out.grad_w_ih.data());
    add_outer(ds.data(), H, &around.seen[row * H], H, out.grad_w_hh.data());
    add(ds.data(), H, out.grad_b_ih.data());
    add(ds.data(), H, out.grad_b_hh.data());
    around.end_back(row, Vector(H), d_seen, dc);
  }
  return out;
}

// LSTM (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000): gates i, f, g, o.
//
//   s = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh           4H, sigma the logistic function
//   i = sigma(s_i + p_i * c_{t-1})   f = sigma(s_f + p_f * c_{t-1})   g = tanh(s_g)
//   c_t = f * c_{t-1} + i * g
//   o = sigma(s_o + p_o * c_t)
//   h_t = o * tanh(c_t)                                 y_t = h_t
//
// p are the peepholes (Gers & Schmidhuber 2000), zero without. With coupled gates (Greff et al.
// 2017) i = 1 - f, and the gates are f, g, o.
//
//   dc = dL/dc_t + dh * o * (1 - tanh(c_t)^2) + ds_o * p_o
//   ds_i = dc * g * i (1 - i)       ds_f = dc * c_{t-1} * f (1 - f)
//   ds_g = dc * i * (1 - g^2)       ds_o = dh * tanh(c_t) * o (1 - o)
//   dc_{t-1} = dc * f + ds_i * p_i + ds_f * p_f         dh_{t-1} = W_hh^T ds
//
//   coupled: ds_f = dc * (c_{t-1} - g) * f (1 - f)
Result lstm(const Problem& p) {
  const std::size_t T = p.T, B = p.B, I = p.I, H = p.H;
  const bool coupled = p.cell == Cell::lstm_coupled;
  const std::size_t G = coupled ? 3 : 4;
  const std::size_t at_f = coupled ? 0 : H, at_g = at_f + H, at_o = at_g + H;  // in s
  const std::size_t peep_o = coupled ? H : 2 * H;                              // in the peepholes
  const auto peephole = [&](std::size_t j) { return p.peephole != nullptr ? p.peephole[j] : 0.0; };
  Result out = begin(p);
  Around around(p, out);

  Vector i(T * B * H), f(T * B * H), g(T * B * H), o(T * B * H), c(T * B * H);
  for (std::size_t row = 0; row < T * B; ++row) {
    if (!around.begin(row)) continue;
    Vector s(G * H);
    add_product(p.w_ih, G * H, I, &p.x[row * I], s.data());
    add(p.b_ih, G * H, s.data());
    add_product(p.w_hh, G * H, H, &around.seen[row * H], s.data());
    add(p.b_hh, G * H, s.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      const double before = around.c_prev[k];
      f[k] = logistic(s[at_f + j] + peephole(at_f + j) * before);
      i[k] = coupled ? 1.0 - f[k] : logistic(s[j] + peephole(j) * before);
      g[k] = std::tanh(s[at_g + j]);
      c[k] = f[k] * before + i[k] * g[k];
      o[k] = logistic(s[at_o + j] + peephole(peep_o + j) * c[k]);
      around.end(row, j, o[k] * std::tanh(c[k]), c[k]);
    }
  }

  for (std::size_t row = T * B; row-- > 0;) {
    Vector dh, dc, ds(G * H), d_seen(H);
    if (!around.begin_back(row, dh, dc)) continue;
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      const double before = around.c_prev[k], tanh_c = std::tanh(c[k]);
      ds[at_o + j] = dh[j] * tanh_c * o[k] * (1.0 - o[k]);
      out.grad_peephole[peep_o + j] += ds[at_o + j] * c[k];
      const double d =
          dc[j] + dh[j] * o[k] * (1.0 - tanh_c * tanh_c) + ds[at_o + j] * peephole(peep_o + j);
      ds[at_g + j] = d * i[k] * (1.0 - g[k] * g[k]);
      ds[at_f + j] = d * (coupled ? before - g[k] : before) * f[k] * (1.0 - f[k]);
      out.grad_peephole[at_f + j] += ds[at_f + j] * before;
      dc[j] = d * f[k] + ds[at_f + j] * peephole(at_f + j);
      if (coupled) continue;
      ds[j] = d * g[k] * i[k] * (1.0 - i[k]);
      out.grad_peephole[j] += ds[j] * before;
      dc[j] += ds[j] * peephole(j);
    }
    add_transposed_product(p.w_ih, G * H, I, ds.data(), &out.grad_x[row * I]);
    add_transposed_product(p.w_hh, G * H, H, ds.data(), d_seen.data());
    add_outer(ds.data(), G * H, &p.x[row * I], I, out.grad_w_ih.data());
    add_outer(ds.data(), G * H, &around.seen[row * H], H, out.grad_w_hh.data());
    add(ds.data(), G * H, out.grad_b_ih.data());
    add(ds.data(), G * H, out.grad_b_hh.data());
    around.end_back(row, Vector(H), d_seen, dc);
  }
  return out;
}

// LSTM with a projection (Sak et al. 2014), and without any option: h has P values.
//
//   s, c_t as above, but W_hh is [4H, P]
//   m_t = o * tanh(c_t)                                 H
//   h_t = W_hr m_t                                      y_t = h_t
//
//   dm = W_hr^T dh, which takes the place of dh above
Result lstm_projected(const Problem& p) {
  const std::size_t T = p.T, B = p.B, I = p.I, H = p.H, R = p.R();
  Result out = begin(p);

  Vector h_prev(T * B * R), c_prev(T * B * H), c_next(T * B * H), m(T * B * H);
  Vector i(T * B * H), f(T * B * H), g(T * B * H), o(T * B * H);
  for (std::size_t t = 0; t < T; ++t) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      double* h = &out.h[b * R];
      Vector s(4 * H);
      add_product(p.w_ih, 4 * H, I, &p.x[row * I], s.data());
      add(p.b_ih, 4 * H, s.data());
      add_product(p.w_hh, 4 * H, R, h, s.data());
      add(p.b_hh, 4 * H, s.data());
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        c_prev[k] = out.c[b * H + j];
        i[k] = logistic(s[j]);
        f[k] = logistic(s[H + j]);
        g[k] = std::tanh(s[2 * H + j]);
        o[k] = logistic(s[3 * H + j]);
        c_next[k] = f[k] * c_prev[k] + i[k] * g[k];
        out.c[b * H + j] = out.cells[k] = c_next[k];
        m[k] = o[k] * std::tanh(c_next[k]);
      }
      Vector next(R);
      add_product(p.w_hr, R, H, &m[row * H], next.data());
      for (std::size_t j = 0; j < R; ++j) {
        h_prev[row * R + j] = h[j];
        h[j] = next[j];
        out.y[row * R + j] = next[j];
      }
    }
  }

  for (std::size_t t = T; t-- > 0;) {
    for (std::size_t b = 0; b < B; ++b) {
      const std::size_t row = t * B + b;
      double* dh = &out.grad_h0[b * R];
      double* dc = &out.grad_c0[b * H];
      Vector dm(H), ds(4 * H);
      if (p.grad_y != nullptr) add(&p.grad_y[row * R], R, dh);
      add_transposed_product(p.w_hr, R, H, dh, dm.data());
      add_outer(dh, R, &m[row * H], H, out.grad_w_hr.data());
      for (std::size_t j = 0; j < R; ++j) dh[j] = 0.0;
      for (std::size_t j = 0; j < H; ++j) {
        const std::size_t k = row * H + j;
        const double tanh_c = std::tanh(c_next[k]);
        dc[j] += dm[j] * o[k] * (1.0 - tanh_c * tanh_c);
        ds[j] = dc[j] * g[k] * i[k] * (1.0 - i[k]);
        ds[H + j] = dc[j] * c_prev[k] * f[k] * (1.0 - f[k]);
        ds[2 * H + j] = dc[j] * i[k] * (1.0 - g[k] * g[k]);
        ds[3 * H + j] = dm[j] * tanh_c * o[k] * (1.0 - o[k]);
        dc[j] *= f[k];
      }
      add_transposed_product(p.w_ih, 4 * H, I, ds.data(), &out.grad_x[row * I]);
      add_transposed_product(p.w_hh, 4 * H, R, ds.data(), dh);
      add_outer(ds.data(), 4 * H, &p.x[row * I], I, out.grad_w_ih.data());
      add_outer(ds.data(), 4 * H, &h_prev[row * R], R, out.grad_w_hh.data());
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
  Around around(p, out);

  Vector r(T * B * H), z(T * B * H), n(T * B * H), u_n(T * B * H);
  for (std::size_t row = 0; row < T * B; ++row) {
    if (!around.begin(row)) continue;
    Vector a(3 * H), u(3 * H);
    add_product(p.w_ih, 3 * H, I, &p.x[row * I], a.data());
    add(p.b_ih, 3 * H, a.data());
    add_product(p.w_hh, 3 * H, H, &around.seen[row * H], u.data());
    add(p.b_hh, 3 * H, u.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      u_n[k] = u[2 * H + j];
      r[k] = logistic(a[j] + u[j]);
      z[k] = logistic(a[H + j] + u[H + j]);
      n[k] = std::tanh(a[2 * H + j] + r[k] * u_n[k]);
      around.end(row, j, (1.0 - z[k]) * n[k] + z[k] * around.h_prev[k]);
    }
  }

  for (std::size_t row = T * B; row-- > 0;) {
    Vector dh, dc, da(3 * H), du(3 * H), d_seen(H);
    if (!around.begin_back(row, dh, dc)) continue;
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      da[H + j] = dh[j] * (around.h_prev[k] - n[k]) * z[k] * (1.0 - z[k]);
      da[2 * H + j] = dh[j] * (1.0 - z[k]) * (1.0 - n[k] * n[k]);
      da[j] = da[2 * H + j] * u_n[k] * r[k] * (1.0 - r[k]);
      du[j] = da[j];
      du[H + j] = da[H + j];
      du[2 * H + j] = da[2 * H + j] * r[k];
      dh[j] *= z[k];
    }
    add_transposed_product(p.w_ih, 3 * H, I, da.data(), &out.grad_x[row * I]);
    add_transposed_product(p.w_hh, 3 * H, H, du.data(), d_seen.data());
    add_outer(da.data(), 3 * H, &p.x[row * I], I, out.grad_w_ih.data());
    add_outer(du.data(), 3 * H, &around.seen[row * H], H, out.grad_w_hh.data());
    add(da.data(), 3 * H, out.grad_b_ih.data());
    add(du.data(), 3 * H, out.grad_b_hh.data());
    around.end_back(row, dh, d_seen, dc);
  }
  return out;
}

// GRU with the reset gate before the product, as Cho et al. 2014 wrote it: gates r, z, n, where
// W_hh = (W_hr; W_hz; W_hn) and b_hh = (b_hr; b_hz; b_hn) along the rows, and the products see
// h_{t-1} as the options leave it.
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
  Around around(p, out);
  const double* w_hn = p.w_hh + 2 * H * H;
  const double* b_hn = p.b_hh != nullptr ? p.b_hh + 2 * H : nullptr;

  Vector r(T * B * H), z(T * B * H), n(T * B * H), q(T * B * H);
  for (std::size_t row = 0; row < T * B; ++row) {
    if (!around.begin(row)) continue;
    Vector s(3 * H);
    add_product(p.w_ih, 3 * H, I, &p.x[row * I], s.data());
    add(p.b_ih, 3 * H, s.data());
    add_product(p.w_hh, 2 * H, H, &around.seen[row * H], s.data());
    add(p.b_hh, 2 * H, s.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      r[k] = logistic(s[j]);
      z[k] = logistic(s[H + j]);
      q[k] = r[k] * around.seen[k];
    }
    add_product(w_hn, H, H, &q[row * H], &s[2 * H]);
    add(b_hn, H, &s[2 * H]);
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      n[k] = std::tanh(s[2 * H + j]);
      around.end(row, j, (1.0 - z[k]) * n[k] + z[k] * around.h_prev[k]);
    }
  }

  for (std::size_t row = T * B; row-- > 0;) {
    Vector dh, dc, ds(3 * H), dq(H), d_seen(H);
    if (!around.begin_back(row, dh, dc)) continue;
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      ds[H + j] = dh[j] * (around.h_prev[k] - n[k]) * z[k] * (1.0 - z[k]);
      ds[2 * H + j] = dh[j] * (1.0 - z[k]) * (1.0 - n[k] * n[k]);
      dh[j] *= z[k];
    }
    add_transposed_product(w_hn, H, H, &ds[2 * H], dq.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      ds[j] = dq[j] * around.seen[k] * r[k] * (1.0 - r[k]);
      d_seen[j] += dq[j] * r[k];
    }
    add_transposed_product(p.w_ih, 3 * H, I, ds.data(), &out.grad_x[row * I]);
    add_transposed_product(p.w_hh, 2 * H, H, ds.data(), d_seen.data());
    add_outer(ds.data(), 3 * H, &p.x[row * I], I, out.grad_w_ih.data());
    add_outer(ds.data(), 2 * H, &around.seen[row * H], H, out.grad_w_hh.data());
    add_outer(&ds[2 * H], H, &q[row * H], H, &out.grad_w_hh[2 * H * H]);
    add(ds.data(), 3 * H, out.grad_b_ih.data());
    add(ds.data(), 3 * H, out.grad_b_hh.data());
    around.end_back(row, dh, d_seen, dc);
  }
  return out;
}

}  // namespace

bool has_cell_state(Cell cell) { return cell == Cell::lstm || cell == Cell::lstm_coupled; }

int gates(Cell cell) {
  switch (cell) {
    case Cell::rnn_tanh:
    case Cell::rnn_relu:
      return 1;
    case Cell::lstm:
      return 4;
    case Cell::gru:
    case Cell::gru_reset_before:
    case Cell::lstm_coupled:
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
      if (problem.w_hr != nullptr) return lstm_projected(problem);
      [[fallthrough]];
    case Cell::lstm_coupled:
      return lstm(problem);
    case Cell::gru:
      return gru(problem);
    case Cell::gru_reset_before:
      return gru_reset_before(problem);
  }
  return {};
}

}  // namespace fastbptt::reference
