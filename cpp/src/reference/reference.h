// The recurrent layers as the formulas say them: float64, explicit loops, nothing shared with the
// kernels they judge. Only the tests see this code.
//
// Source of every backward pass: the error at a step is the error of its own output plus what comes
// back from the step after it,
//
//   dL/dh_t = dL/dy_t + (dL/dh_t through step t+1),
//
// pushed through the derivative of each line of the forward pass, last line first (Werbos 1990,
// "Backpropagation through time: what it does and how to do it"). Names, gate order and shapes are
// those of PyTorch:
//
//   x, grad_x             [T, B, I]
//   y, grad_y             [T, B, H]
//   h0, c0, h, c, grad_*  [B, H]
//   w_ih                  [G*H, I]    the gates stacked along the rows, G = 1, 4, 3
//   w_hh                  [G*H, H]
//   w_hr                  [P, H]      with a projection; h, y and their gradients then have P in
//   the
//                                     place of H, and w_hh is [G*H, P]
//   b_ih, b_hh            [G*H]
//
// all contiguous with the last axis fastest.
#pragma once

#include <cstddef>
#include <vector>

namespace fastbptt::reference {

enum class Cell { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before, lstm_coupled };

// Gates of a cell: how many blocks of H rows its weights have.
int gates(Cell cell);
bool has_cell_state(Cell cell);

// One layer, its input and the error of its results. A null pointer stands for zeros; c0 and grad_c
// are read by the LSTM only.
struct Problem {
  Cell cell;
  std::size_t T, B, I, H;
  const double* x;
  const double* h0;
  const double* c0;
  const double* w_ih;
  const double* w_hh;
  const double* b_ih;
  const double* b_hh;
  const double* grad_y;
  const double* grad_h;  // of the state after the last step
  const double* grad_c;

  // Options; null: without.
  const bool* resets;            // [T, B]  whether the state before the step is restart
  const double* restart_h;       // [H]     null: zeros
  const double* restart_c;       // [H]
  const bool* mask;              // [T, B]  whether there is a step, else the state is carried over
  const double* recurrent_mask;  // [B, H]  what h' is multiplied by before W_hh
  const double* keep_h;          // [T, B, H]  zoneout: the part of h' that stays
  const double* keep_c;
  const double* peephole;    // [3*H] of i, f, o; coupled [2*H] of f, o
  const double* grad_cells;  // [T, B, H]  error of every c

  // A projection; null: none. h0, restart_h, recurrent_mask and keep_h then have P for H.
  std::size_t P;
  const double* w_hr;

  // Layer normalisation of LSTM and GRU (reset after); gain_ih null: none.
  const double* gain_ih;  // [G*H]
  const double* gain_hh;  // [G*H]
  const double* gain_c;   // [H]  LSTM
  const double* shift_c;  // [H]  LSTM, null: zeros
  std::size_t R() const { return w_hr != nullptr ? P : H; }
};

// The state vectors are those after the last step; what is of c is empty but for the LSTM.
struct Result {
  std::vector<double> y, h, c;
  std::vector<double> grad_x, grad_h0, grad_c0;
  std::vector<double> grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_w_hr;
  double kink;  // the smallest magnitude, but for zeros, of what went into a relu
  std::vector<double> cells, grad_peephole, grad_restart_h, grad_restart_c;
  std::vector<double> grad_gain_ih, grad_gain_hh, grad_gain_c, grad_shift_c;
};

Result run(const Problem& problem);

}  // namespace fastbptt::reference
