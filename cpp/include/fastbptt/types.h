// Plain types of the public C++ API. Sizes: T steps, B batch rows, I input, H hidden, G gates, L
// layers.
#pragma once
#include <cstddef>

namespace fastbptt {

using Index = std::ptrdiff_t;

enum class Cell { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before };

// Rows of blocks of H in the weights, in PyTorch's order: h; i,f,g,o; r,z,n.
constexpr Index gates(Cell cell) {
  switch (cell) {
    case Cell::lstm:
      return 4;
    case Cell::gru:
    case Cell::gru_reset_before:
      return 3;
    default:
      return 1;
  }
}

// Values that a tape keeps a step, batch row and hidden unit, beside y.
constexpr Index tape_width(Cell cell) {
  switch (cell) {
    case Cell::lstm:
      return 5;  // i, f, g, o, c
    case Cell::gru:
      return 4;  // r, z, n, u_n
    case Cell::gru_reset_before:
      return 3;  // r, z, n
    default:
      return 0;  // y is enough
  }
}

constexpr bool has_cell_state(Cell cell) { return cell == Cell::lstm; }

struct LayerShape {
  Cell cell;
  Index input_size;
  Index hidden_size;
};

// A sequence [T, B, F] whose last axis is contiguous: element (t, b, f) is data[t*step + b*row +
// f].
template <class S>
struct Sequence {
  S* data = nullptr;
  Index step = 0;
  Index row = 0;
  S* at(Index t, Index b = 0) const { return data + t * step + b * row; }
  Sequence from(Index t, Index b = 0) const {
    return data ? Sequence{at(t, b), step, row} : Sequence{nullptr, step, row};
  }
};

// h and, for the LSTM, c: [B, H] of a layer or [L, B, H] of a stack, contiguous.
template <class S>
struct State {
  S* h = nullptr;
  S* c = nullptr;
};

// PyTorch's layout: w_ih [G*H, I], w_hh [G*H, H], biases [G*H] or null.
template <class S>
struct Weights {
  S* w_ih = nullptr;
  S* w_hh = nullptr;
  S* b_ih = nullptr;
  S* b_hh = nullptr;
};

enum class Loss { cross_entropy, mse };

}  // namespace fastbptt
