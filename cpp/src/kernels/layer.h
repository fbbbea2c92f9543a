// One layer through a run of steps, on Eigen's products: the input product of all the steps at
// once, then, step after step, the recurrent product and the cell.
#pragma once
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "kernels/kernel_table.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class S>
using Rows = Eigen::Map<const Matrix<S>, 0, Eigen::OuterStride<>>;
template <class S>
using MutableRows = Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>>;

template <class S>
Rows<S> rows(const S* data, Index n, Index columns, Index stride) {
  return Rows<S>(data, n, columns, Eigen::OuterStride<>(stride));
}
template <class S>
MutableRows<S> mutable_rows(S* data, Index n, Index columns, Index stride) {
  return MutableRows<S>(data, n, columns, Eigen::OuterStride<>(stride));
}

// Steps whose rows all lie at one stride are one matrix; others are taken step by step.
template <class S, class F>
void for_matrices(const Sequence<S>& x, Index steps, Index batch, F&& body) {
  if (x.step == batch * x.row) return body(0, steps * batch);
  for (Index t = 0; t < steps; ++t) body(t, batch);
}

// The weights of a layer, one after another: w_ih, w_hh, b_ih, b_hh (zeros without bias).
template <class S>
struct Packed {
  static Index size(const LayerShape& s) {
    return gates(s.cell) * s.hidden_size * (s.input_size + s.hidden_size + 2);
  }
  static void pack(const LayerShape& s, const Weights<const S>& w, S* packed) {
    const Index GH = gates(s.cell) * s.hidden_size;
    const auto put = [&](const S* from, Index n) {
      if (from)
        for (Index i = 0; i < n; ++i) packed[i] = from[i];
      else
        for (Index i = 0; i < n; ++i) packed[i] = S(0);
      packed += n;
    };
    put(w.w_ih, GH * s.input_size);
    put(w.w_hh, GH * s.hidden_size);
    put(w.b_ih, GH);
    put(w.b_hh, GH);
  }
  Packed(const LayerShape& s, const S* packed)
      : w_ih(packed, gates(s.cell) * s.hidden_size, s.input_size,
             Eigen::OuterStride<>(s.input_size)),
        w_hh(packed + w_ih.size(), gates(s.cell) * s.hidden_size, s.hidden_size,
             Eigen::OuterStride<>(s.hidden_size)),
        b_ih(packed + w_ih.size() + w_hh.size(), gates(s.cell) * s.hidden_size),
        b_hh(packed + w_ih.size() + w_hh.size() + b_ih.size(), gates(s.cell) * s.hidden_size) {}
  Rows<S> w_ih, w_hh;
  Row<S> b_ih, b_hh;
};

template <class S>
void set_row(S* to, const S* from, Index n) {
  if (from)
    for (Index i = 0; i < n; ++i) to[i] = from[i];
  else
    for (Index i = 0; i < n; ++i) to[i] = S(0);
}

// Scratch: a [steps, B, GH], u [B, GH], rh [B, H], kept [B, tape_width * H] where there is no tape.
template <class S, class Cell>
struct ForwardLayer {
  static constexpr Index G = Cell::gates;

  static Index scratch(const LayerShape& s, Index steps, Index batch) {
    const Index H = s.hidden_size;
    return batch * H * ((steps + 1) * G + 1 + tape_width(s.cell));
  }

  static void run(const ForwardJob<S>& job) {
    const Index B = job.batch, H = job.shape.hidden_size, I = job.shape.input_size;
    const Packed<S> w(job.shape, job.packed);
    S* const a = job.scratch;
    S* const u = a + job.steps * B * G * H;
    S* const rh = u + B * G * H;
    const Index kept_row = tape_width(job.shape.cell) * H;
    const Sequence<S> tape = job.tape.data ? job.tape : Sequence<S>{rh + B * H, 0, kept_row};

    for_matrices(job.x, job.steps, B, [&](Index t, Index n) {
      auto out = mutable_rows(a + t * B * G * H, n, G * H, G * H);
      out.noalias() = rows(job.x.at(t), n, I, job.x.row) * w.w_ih.transpose();
      out.rowwise() += w.b_ih.matrix();
    });
    Sequence<const S> before{job.state.h, 0, H};
    for (Index t = 0; t < job.steps; ++t) {
      const S* a_t = a + t * B * G * H;
      // The rows [first, first + n) of the recurrent product.
      const auto multiply = [&](const Rows<S>& h, Index first, Index n) {
        auto out = mutable_rows(u + first, B, n, G * H);
        out.noalias() = h * w.w_hh.middleRows(first, n).transpose();
        out.rowwise() += w.b_hh.segment(first, n).matrix();
      };
      const Rows<S> h = rows(before.data, B, H, before.row);
      if constexpr (Cell::two_phases) {
        multiply(h, 0, 2 * H);
        for (Index b = 0; b < B; ++b) {
          Cell::forward_gates(H, a_t + b * G * H, u + b * G * H, before.at(0, b), tape.at(t, b),
                              rh + b * H);
        }
        multiply(rows<S>(rh, B, H, H), 2 * H, H);
        for (Index b = 0; b < B; ++b) {
          Cell::forward_candidate(H, a_t + b * G * H, u + b * G * H, before.at(0, b), tape.at(t, b),
                                  job.y.at(t, b));
        }
      } else {
        multiply(h, 0, G * H);
        for (Index b = 0; b < B; ++b) {
          Cell::forward(H, a_t + b * G * H, u + b * G * H, before.at(0, b), job.y.at(t, b),
                        job.state.c + b * H, tape.at(t, b));
        }
      }
      before = {job.y.at(t), 0, job.y.row};
    }
    mutable_rows(job.state.h, B, H, H) = rows(before.data, B, H, before.row);
  }
};

// Scratch: the weight gradients, as Packed lays the weights out, which live from job to job; then
// da and du [steps, B, GH] (one and the same but for the GRU), dh [B, H], rh [steps, B, H], zeros
// [H].
template <class S, class Cell>
struct ReverseLayer {
  static constexpr Index G = Cell::gates;

  static Index scratch(const LayerShape& s, Index steps, Index batch) {
    return Packed<S>::size(s) + batch * s.hidden_size * (steps * (2 * G + 1) + 1) + s.hidden_size;
  }

  static void begin(const LayerShape& s, S* scratch) {
    set_row<S>(scratch, nullptr, Packed<S>::size(s));
  }

  static void run(const ReverseJob<S>& job) {
    const Index B = job.batch, H = job.shape.hidden_size, I = job.shape.input_size;
    const Index n_steps = job.steps;
    const Packed<S> w(job.shape, job.packed);
    S* const da = job.scratch + Packed<S>::size(job.shape);
    S* const du = Cell::splits_gradients ? da + n_steps * B * G * H : da;
    S* const rh = da + 2 * n_steps * B * G * H;
    S* const dh = rh + n_steps * B * H;
    S* const zeros = dh + B * H;
    set_row<S>(zeros, nullptr, H);

    // The state before a step: the row of y or of the tape before it, or the initial state.
    const auto h_before = [&](Index t, Index b) -> const S* {
      if (t > 0 || !job.first) return job.y.at(t - 1, b);
      return job.initial.h ? job.initial.h + b * H : zeros;
    };
    const auto c_before = [&](Index t, Index b) -> const S* {
      if (!has_cell_state(job.shape.cell)) return nullptr;
      if (t > 0 || !job.first) return job.tape.at(t - 1, b) + 4 * H;
      return job.initial.c ? job.initial.c + b * H : zeros;
    };

    S* const gh = job.grad_state.h;
    for (Index t = n_steps - 1; t >= 0; --t) {
      S* const da_t = da + t * B * G * H;
      S* const du_t = du + t * B * G * H;
      auto grad_h = mutable_rows(gh, B, H, H);
      if (job.grad_y.data) grad_h += rows(job.grad_y.at(t), B, H, job.grad_y.row);
      const Rows<S> du_rows = rows<S>(du_t, B, G * H, G * H);
      if constexpr (Cell::two_phases) {
        for (Index b = 0; b < B; ++b) {
          Cell::backward_candidate(H, job.tape.at(t, b), h_before(t, b), gh + b * H,
                                   da_t + b * G * H, rh + (t * B + b) * H);
        }
        mutable_rows(dh, B, H, H).noalias() = du_rows.rightCols(H) * w.w_hh.bottomRows(H);
        for (Index b = 0; b < B; ++b) {
          Cell::backward_gates(H, job.tape.at(t, b), h_before(t, b), dh + b * H, gh + b * H,
                               da_t + b * G * H);
        }
        grad_h.noalias() += du_rows.leftCols(2 * H) * w.w_hh.topRows(2 * H);
      } else {
        for (Index b = 0; b < B; ++b) {
          S* const gc = job.grad_state.c ? job.grad_state.c + b * H : nullptr;
          const S* const kept = tape_width(job.shape.cell) ? job.tape.at(t, b) : nullptr;
          const S* const before = Cell::needs_h ? h_before(t, b) : nullptr;
          Cell::backward(H, kept, before, c_before(t, b), job.y.at(t, b), gh + b * H, gc,
                         da_t + b * G * H, du_t + b * G * H);
        }
        grad_h.noalias() += du_rows * w.w_hh;
      }
    }

    S* grads = job.scratch;
    MutableRows<S> dw_ih = mutable_rows(grads, G * H, I, I);
    MutableRows<S> dw_hh = mutable_rows(grads += G * H * I, G * H, H, H);
    MutableRow<S> db_ih(grads += G * H * H, G * H);
    MutableRow<S> db_hh(grads += G * H, G * H);
    for_matrices(job.x, n_steps, B, [&](Index t, Index n) {
      dw_ih.noalias() += rows<S>(da + t * B * G * H, n, G * H, G * H).transpose() *
                         rows(job.x.at(t), n, I, job.x.row);
    });
    for (Index t = 0; t < n_steps; ++t) {
      const Rows<S> du_t = rows<S>(du + t * B * G * H, B, G * H, G * H);
      const bool zero = t == 0 && job.first && !job.initial.h;
      const Index h_row = t > 0 || !job.first ? job.y.row : H;
      const Index plain = Cell::two_phases ? 2 * H : G * H;
      if (!zero) {
        dw_hh.topRows(plain).noalias() +=
            du_t.leftCols(plain).transpose() * rows(h_before(t, 0), B, H, h_row);
      }
      if (Cell::two_phases) {
        dw_hh.bottomRows(H).noalias() +=
            du_t.rightCols(H).transpose() * rows<S>(rh + t * B * H, B, H, H);
      }
    }
    db_ih += rows<S>(da, n_steps * B, G * H, G * H).colwise().sum().array();
    db_hh += rows<S>(du, n_steps * B, G * H, G * H).colwise().sum().array();
    if (job.grad_x.data) {
      for_matrices(job.grad_x, n_steps, B, [&](Index t, Index n) {
        mutable_rows(job.grad_x.at(t), n, I, job.grad_x.row).noalias() =
            rows<S>(da + t * B * G * H, n, G * H, G * H) * w.w_ih;
      });
    }
  }

  static void finish(const LayerShape& s, const S* scratch, const Weights<S>& grad) {
    const Index GH = G * s.hidden_size;
    const auto add = [&](S* to, Index n) {
      if (to)
        for (Index i = 0; i < n; ++i) to[i] += scratch[i];
      scratch += n;
    };
    add(grad.w_ih, GH * s.input_size);
    add(grad.w_hh, GH * s.hidden_size);
    add(grad.b_ih, GH);
    add(grad.b_hh, GH);
  }
};

// Calls body with the cell's arithmetic, chosen at run time.
template <class S, class F>
auto with_cell(Cell cell, F&& body) {
  switch (cell) {
    case Cell::rnn_relu:
      return body(RnnCell<S, true>{});
    case Cell::lstm:
      return body(LstmCell<S>{});
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
      &Packed<S>::size,
      &Packed<S>::pack,
      [](const LayerShape& s, Index steps, Index batch) {
        return with_cell<S>(s.cell, [&](auto cell) {
          return ForwardLayer<S, decltype(cell)>::scratch(s, steps, batch);
        });
      },
      [](const ForwardJob<S>& job) {
        with_cell<S>(job.shape.cell, [&](auto cell) { ForwardLayer<S, decltype(cell)>::run(job); });
      },
      &Packed<S>::size,
      &Packed<S>::pack,
      [](const LayerShape& s, Index steps, Index batch) {
        return with_cell<S>(s.cell, [&](auto cell) {
          return ReverseLayer<S, decltype(cell)>::scratch(s, steps, batch);
        });
      },
      [](const LayerShape& s, S* scratch) {
        with_cell<S>(s.cell,
                     [&](auto cell) { ReverseLayer<S, decltype(cell)>::begin(s, scratch); });
      },
      [](const ReverseJob<S>& job) {
        with_cell<S>(job.shape.cell, [&](auto cell) { ReverseLayer<S, decltype(cell)>::run(job); });
      },
      [](const LayerShape& s, const S* scratch, const Weights<S>& grad) {
        with_cell<S>(s.cell,
                     [&](auto cell) { ReverseLayer<S, decltype(cell)>::finish(s, scratch, grad); });
      },
  };
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
