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
  out.grad_gain_ih.resize(GH);
  out.grad_gain_hh.resize(GH);
  out.grad_gain_c.resize(p.H);
  out.grad_shift_c.resize(p.H);
  return out;
}

// Layer normalisation (Ba, Kiros & Hinton 2016) of the values of a row, in groups that follow one
// another, each by its own mean and variance:
//
//   v^ = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + epsilon)       out = gain * v^
//
// With d^ = dL/dv^ = gain * dL/dout and s = 1 / sqrt(...):
//
//   dL/dv = s * (d^ - mean(d^) - v^ * mean(d^ * v^))
//
// Without gains v goes through as it is.
class Norm {
 public:
  static constexpr double epsilon = 1e-5;

  Norm(std::size_t rows, const double* gain, const std::vector<std::size_t>& groups)
      : gain_(gain), groups_(groups), normal_(rows), scale_(rows) {}

  Vector forward(std::size_t row, const Vector& v) {
    if (gain_ == nullptr) return v;
    Vector out(v.size());
    normal_[row].resize(v.size());
    for_groups([&](std::size_t begin, std::size_t n) {
      double mean = 0.0, variance = 0.0;
      for (std::size_t i = begin; i < begin + n; ++i) mean += v[i] / double(n);
      for (std::size_t i = begin; i < begin + n; ++i)
        variance += (v[i] - mean) * (v[i] - mean) / double(n);
      const double scale = 1.0 / std::sqrt(variance + epsilon);
      scale_[row].push_back(scale);
      for (std::size_t i = begin; i < begin + n; ++i) {
        normal_[row][i] = (v[i] - mean) * scale;
        out[i] = gain_[i] * normal_[row][i];
      }
    });
    return out;
  }

  Vector backward(std::size_t row, const Vector& grad_out, Vector& grad_gain) const {
    if (gain_ == nullptr) return grad_out;
    const Vector& normal = normal_[row];
    Vector out(grad_out.size());
    std::size_t group = 0;
    for_groups([&](std::size_t begin, std::size_t n) {
      double mean = 0.0, along = 0.0;
      for (std::size_t i = begin; i < begin + n; ++i) {
        const double d = gain_[i] * grad_out[i];
        grad_gain[i] += grad_out[i] * normal[i];
        mean += d / double(n);
        along += d * normal[i] / double(n);
      }
      const double scale = scale_[row][group++];
      for (std::size_t i = begin; i < begin + n; ++i) {
        out[i] = scale * (gain_[i] * grad_out[i] - mean - normal[i] * along);
      }
    });
    return out;
  }

 private:
  template <class F>
  void for_groups(F&& f) const {
    std::size_t begin = 0;
    for (const std::size_t n : groups_) {
      f(begin, n);
      begin += n;
    }
  }

  const double* gain_;
  std::vector<std::size_t> groups_;
  std::vector<Vector> normal_, scale_;
};

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
      : h_prev(p.T * p.B * p.R()),
        c_prev(has_cell_state(p.cell) ? p.T * p.B * p.H : 0),
        seen(h_prev.size()),
        p_(p),
        out_(out) {}

  // Of every step, [T, B, H].
  Vector h_prev, c_prev, seen;

  bool missing(std::size_t row) const { return p_.mask != nullptr && !p_.mask[row]; }
  bool reset(std::size_t row) const { return p_.resets != nullptr && p_.resets[row]; }

  // Sets the three; whether there is a step for the cell to make.
  bool begin(std::size_t row) {
    const std::size_t b = row % p_.B;
    for (std::size_t j = 0; j < p_.R(); ++j) {
      const std::size_t k = row * p_.R() + j, s = b * p_.R() + j;
      h_prev[k] = reset(row) ? value(p_.restart_h, j) : out_.h[s];
      seen[k] = p_.recurrent_mask != nullptr ? p_.recurrent_mask[s] * h_prev[k] : h_prev[k];
      if (missing(row)) set_h(row, j, h_prev[k]);
    }
    for (std::size_t j = 0; j < cells(); ++j) {
      const std::size_t k = row * p_.H + j;
      c_prev[k] = reset(row) ? value(p_.restart_c, j) : out_.c[b * p_.H + j];
      if (missing(row)) set_c(row, j, c_prev[k]);
    }
    return !missing(row);
  }
  // Take h~ and c~ of one unit.
  void end_h(std::size_t row, std::size_t j, double h) {
    const std::size_t k = row * p_.R() + j;
    const double keep = value(p_.keep_h, k);
    set_h(row, j, keep * h_prev[k] + (1.0 - keep) * h);
  }
  void end_c(std::size_t row, std::size_t j, double c) {
    const std::size_t k = row * p_.H + j;
    const double keep = value(p_.keep_c, k);
    set_c(row, j, keep * c_prev[k] + (1.0 - keep) * c);
  }

  // The way back. begin_back gives dL/dh~ and dL/dc~, or false where the step is missing; end_back
  // takes what of h' and c' the cell gives back: dL/dh' apart from the products, dL/d(m h'),
  // dL/dc'.
  bool begin_back(std::size_t row, Vector& dh, Vector& dc) {
    const std::size_t b = row % p_.B;
    split(row, p_.R(), &out_.grad_h0[b * p_.R()], p_.grad_y, p_.keep_h, dh, past_h_);
    split(row, cells(), out_.grad_c0.data() + b * cells(), p_.grad_cells, p_.keep_c, dc, past_c_);
    if (missing(row)) end_back(row, Vector(p_.R()), Vector(p_.R()), Vector(p_.H));
    return !missing(row);
  }
  void end_back(std::size_t row, const Vector& dh, const Vector& d_seen, const Vector& dc) {
    const std::size_t b = row % p_.B;
    for (std::size_t j = 0; j < p_.R(); ++j) {
      const std::size_t s = b * p_.R() + j;
      const double m = p_.recurrent_mask != nullptr ? p_.recurrent_mask[s] : 1.0;
      give_back(row, past_h_[j] + dh[j] + m * d_seen[j], out_.grad_h0[s], out_.grad_restart_h[j]);
    }
    for (std::size_t j = 0; j < cells(); ++j) {
      give_back(row, past_c_[j] + dc[j], out_.grad_c0[b * p_.H + j], out_.grad_restart_c[j]);
    }
  }

 private:
  std::size_t cells() const { return has_cell_state(p_.cell) ? p_.H : 0; }
  static double value(const double* v, std::size_t i) { return v != nullptr ? v[i] : 0.0; }
  void set_h(std::size_t row, std::size_t j, double h) {
    out_.h[row % p_.B * p_.R() + j] = out_.y[row * p_.R() + j] = h;
  }
  void set_c(std::size_t row, std::size_t j, double c) {
    out_.c[row % p_.B * p_.H + j] = out_.cells[row * p_.H + j] = c;
  }
  // What comes to n values of a step, in what goes on to the cell and what passes it.
  void split(std::size_t row, std::size_t n, const double* later, const double* own,
             const double* keep, Vector& to_cell, Vector& past) const {
    to_cell.assign(n, 0.0);
    past.assign(n, 0.0);
    for (std::size_t j = 0; j < n; ++j) {
      const std::size_t k = row * n + j;
      const double kept = missing(row) ? 1.0 : value(keep, k), d = later[j] + value(own, k);
      past[j] = kept * d;
      to_cell[j] = (1.0 - kept) * d;
    }
  }
  void give_back(std::size_t row, double d, double& before, double& restart) const {
    before = reset(row) ? 0.0 : d;
    if (reset(row)) restart += d;
  }

  const Problem& p_;
  Result& out_;
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
      if (s[j] != 0) out.kink = std::min(out.kink, std::abs(s[j]));
      // In this form a NaN stays a NaN.
      h[k] = p.cell == Cell::rnn_tanh ? std::tanh(s[j]) : (s[j] <= 0.0 ? 0.0 : s[j]);
      around.end_h(row, j, h[k]);
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
//   m_t = o * tanh(c_t)
//   h_t = m_t, or W_hr m_t with a projection (Sak et al. 2014)          y_t = h_t
//
// p are the peepholes (Gers & Schmidhuber 2000), zero without. With coupled gates (Greff et al.
// 2017) i = 1 - f, and the gates are f, g, o. With layer normalisation W_ih x_t, W_hh h_{t-1} and
// the c_t inside the tanh are normalised, the products over all gates.
//
//   dm = dh, or W_hr^T dh
//   dc = dL/dc_t + dm * o * (1 - tanh(c_t)^2) + ds_o * p_o
//   ds_i = dc * g * i (1 - i)       ds_f = dc * c_{t-1} * f (1 - f)
//   ds_g = dc * i * (1 - g^2)       ds_o = dm * tanh(c_t) * o (1 - o)
//   dc_{t-1} = dc * f + ds_i * p_i + ds_f * p_f         dh_{t-1} = W_hh^T ds
//
//   coupled: ds_f = dc * (c_{t-1} - g) * f (1 - f)
Result lstm(const Problem& p) {
  const std::size_t T = p.T, B = p.B, I = p.I, H = p.H, R = p.R();
  const bool coupled = p.cell == Cell::lstm_coupled;
  const std::size_t G = coupled ? 3 : 4;
  const std::size_t at_f = coupled ? 0 : H, at_g = at_f + H, at_o = at_g + H;  // in s
  const std::size_t peep_o = coupled ? H : 2 * H;                              // in the peepholes
  const auto peephole = [&](std::size_t j) { return p.peephole != nullptr ? p.peephole[j] : 0.0; };
  Result out = begin(p);
  Around around(p, out);
  Norm norm_x(T * B, p.gain_ih, {G * H}), norm_h(T * B, p.gain_hh, {G * H});
  Norm norm_c(T * B, p.gain_c, {H});

  Vector i(T * B * H), f(T * B * H), g(T * B * H), o(T * B * H), c(T * B * H);
  Vector tanh_c(T * B * H), m(T * B * H);
  for (std::size_t row = 0; row < T * B; ++row) {
    if (!around.begin(row)) continue;
    Vector a(G * H), u(G * H);
    add_product(p.w_ih, G * H, I, &p.x[row * I], a.data());
    add_product(p.w_hh, G * H, R, &around.seen[row * R], u.data());
    Vector s = norm_x.forward(row, a);
    add(norm_h.forward(row, u).data(), G * H, s.data());
    add(p.b_ih, G * H, s.data());
    add(p.b_hh, G * H, s.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      const double before = around.c_prev[k];
      f[k] = logistic(s[at_f + j] + peephole(at_f + j) * before);
      i[k] = coupled ? 1.0 - f[k] : logistic(s[j] + peephole(j) * before);
      g[k] = std::tanh(s[at_g + j]);
      c[k] = f[k] * before + i[k] * g[k];
      o[k] = logistic(s[at_o + j] + peephole(peep_o + j) * c[k]);
      around.end_c(row, j, c[k]);
    }
    Vector inside = norm_c.forward(row, Vector(&c[row * H], &c[row * H] + H));
    add(p.shift_c, H, inside.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      tanh_c[k] = std::tanh(inside[j]);
      m[k] = o[k] * tanh_c[k];
      if (p.w_hr == nullptr) around.end_h(row, j, m[k]);
    }
    if (p.w_hr == nullptr) continue;
    Vector h(R);
    add_product(p.w_hr, R, H, &m[row * H], h.data());
    for (std::size_t j = 0; j < R; ++j) around.end_h(row, j, h[j]);
  }

  for (std::size_t row = T * B; row-- > 0;) {
    Vector dh, dc, ds(G * H), d_seen(R), d_inside(H);
    if (!around.begin_back(row, dh, dc)) continue;
    Vector dm = dh;
    if (p.w_hr != nullptr) {
      dm.assign(H, 0.0);
      add_transposed_product(p.w_hr, R, H, dh.data(), dm.data());
      add_outer(dh.data(), R, &m[row * H], H, out.grad_w_hr.data());
    }
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      d_inside[j] = dm[j] * o[k] * (1.0 - tanh_c[k] * tanh_c[k]);
    }
    add(d_inside.data(), H, out.grad_shift_c.data());
    add(norm_c.backward(row, d_inside, out.grad_gain_c).data(), H, dc.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      const double before = around.c_prev[k];
      ds[at_o + j] = dm[j] * tanh_c[k] * o[k] * (1.0 - o[k]);
      out.grad_peephole[peep_o + j] += ds[at_o + j] * c[k];
      const double d = dc[j] + ds[at_o + j] * peephole(peep_o + j);
      ds[at_g + j] = d * i[k] * (1.0 - g[k] * g[k]);
      ds[at_f + j] = d * (coupled ? before - g[k] : before) * f[k] * (1.0 - f[k]);
      out.grad_peephole[at_f + j] += ds[at_f + j] * before;
      dc[j] = d * f[k] + ds[at_f + j] * peephole(at_f + j);
      if (coupled) continue;
      ds[j] = d * g[k] * i[k] * (1.0 - i[k]);
      out.grad_peephole[j] += ds[j] * before;
      dc[j] += ds[j] * peephole(j);
    }
    add(ds.data(), G * H, out.grad_b_ih.data());
    add(ds.data(), G * H, out.grad_b_hh.data());
    const Vector da = norm_x.backward(row, ds, out.grad_gain_ih);
    const Vector du = norm_h.backward(row, ds, out.grad_gain_hh);
    add_transposed_product(p.w_ih, G * H, I, da.data(), &out.grad_x[row * I]);
    add_transposed_product(p.w_hh, G * H, R, du.data(), d_seen.data());
    add_outer(da.data(), G * H, &p.x[row * I], I, out.grad_w_ih.data());
    add_outer(du.data(), G * H, &around.seen[row * R], R, out.grad_w_hh.data());
    around.end_back(row, Vector(R), d_seen, dc);
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
// With layer normalisation both products are normalised before their biases, over the 2H values of
// r and z and over the H of n.
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
  Norm norm_x(T * B, p.gain_ih, {2 * H, H}), norm_h(T * B, p.gain_hh, {2 * H, H});

  Vector r(T * B * H), z(T * B * H), n(T * B * H), u_n(T * B * H);
  for (std::size_t row = 0; row < T * B; ++row) {
    if (!around.begin(row)) continue;
    Vector a(3 * H), u(3 * H);
    add_product(p.w_ih, 3 * H, I, &p.x[row * I], a.data());
    a = norm_x.forward(row, a);
    add(p.b_ih, 3 * H, a.data());
    add_product(p.w_hh, 3 * H, H, &around.seen[row * H], u.data());
    u = norm_h.forward(row, u);
    add(p.b_hh, 3 * H, u.data());
    for (std::size_t j = 0; j < H; ++j) {
      const std::size_t k = row * H + j;
      u_n[k] = u[2 * H + j];
      r[k] = logistic(a[j] + u[j]);
      z[k] = logistic(a[H + j] + u[H + j]);
      n[k] = std::tanh(a[2 * H + j] + r[k] * u_n[k]);
      around.end_h(row, j, (1.0 - z[k]) * n[k] + z[k] * around.h_prev[k]);
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
    add(da.data(), 3 * H, out.grad_b_ih.data());
    add(du.data(), 3 * H, out.grad_b_hh.data());
    da = norm_x.backward(row, da, out.grad_gain_ih);
    du = norm_h.backward(row, du, out.grad_gain_hh);
    add_transposed_product(p.w_ih, 3 * H, I, da.data(), &out.grad_x[row * I]);
    add_transposed_product(p.w_hh, 3 * H, H, du.data(), d_seen.data());
    add_outer(da.data(), 3 * H, &p.x[row * I], I, out.grad_w_ih.data());
    add_outer(du.data(), 3 * H, &around.seen[row * H], H, out.grad_w_hh.data());
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
      around.end_h(row, j, (1.0 - z[k]) * n[k] + z[k] * around.h_prev[k]);
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
