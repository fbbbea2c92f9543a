// Plain types of the public C++ API. Sizes: T steps, B batch rows, I input, H hidden, G gates, L
// layers, D directions.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastbptt {

using Index = std::ptrdiff_t;

// The upper half of a float32: its exponent, and 8 bits of precision in place of 24. For storage
// only; all arithmetic is float32's.
struct Bfloat16 {
  std::uint16_t bits;
};
// In float32; and back, of a value whose lower half is zero. Inlined, as kernels of several
// instruction sets may use them.
__attribute__((always_inline)) inline float widened(Bfloat16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
__attribute__((always_inline)) inline Bfloat16 narrowed(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<std::uint16_t>(bits >> 16)};
}
template <class S>
using Narrow = std::conditional_t<std::is_const_v<S>, const Bfloat16, Bfloat16>;

// What values of type E are computed in.
template <class E>
using Arithmetic = std::conditional_t<std::is_same_v<E, Bfloat16>, float, E>;

enum class Cell { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before, lstm_coupled };

// Rows of blocks of H in the weights, in PyTorch's order: h; i,f,g,o; r,z,n; f,g,o.
constexpr Index gates(Cell cell) {
  switch (cell) {
    case Cell::lstm:
      return 4;
    case Cell::gru:
    case Cell::gru_reset_before:
    case Cell::lstm_coupled:
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
    case Cell::lstm_coupled:
      return 4;  // f, g, o, c
    case Cell::gru_reset_before:
      return 3;  // r, z, n
    default:
      return 0;  // y is enough
  }
}

constexpr bool has_cell_state(Cell cell) {
  return cell == Cell::lstm || cell == Cell::lstm_coupled;
}

// Numbers that layer normalisation keeps a step and row beside those of the units.
constexpr Index norm_statistics = 4;

// Peepholes that a cell may have: i,f,o; f,o.
constexpr Index peepholes(Cell cell) {
  return cell == Cell::lstm ? 3 : cell == Cell::lstm_coupled ? 2 : 0;
}

// What layers do at each step beside their cell's formula.
struct LayerOptions {
  bool peephole = false;         // the gates see c
  double recurrent_dropout = 0;  // the part of h' that training drops before W_hh
  double zoneout_h = 0;          // the probability that a unit keeps its h
  double zoneout_c = 0;          // and its c
  bool resets = false;           // whether a run may have them
  bool mask = false;
  bool narrow_tape = false;  // the tape is kept in bfloat16; of float32 layers only
  bool layer_norm = false;   // LSTM and GRU that resets after
  int parts = 0;  // bfloat16 values for each float32 in the products; 0: none. A session chooses,
  int part_depth = 0;  // and of how many values a product of them is a multiple.
};

// What float32 products are made of: float32 arithmetic, or at least as accurate; two, or one
// bfloat16 for each value where that is faster. as_set: what is set for float32, else medium.
enum class MatmulPrecision { as_set, highest, high, medium };

struct LayerShape {
  Cell cell;
  Index input_size;
  Index hidden_size;
  Index proj_size = 0;  // P, of the LSTM; 0: no projection
  LayerOptions options{};
  // Values of h, and of y, a step and row.
  constexpr Index output_size() const { return proj_size > 0 ? proj_size : hidden_size; }
  // Values that a tape keeps a step and row. With layer normalisation they are the two normalised
  // products, c, and the statistics.
  constexpr Index tape_size() const {
    if (!options.layer_norm) return tape_width(cell) * hidden_size;
    return (2 * gates(cell) + has_cell_state(cell)) * hidden_size + norm_statistics;
  }
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

// h and, for the LSTM, c: [B, H] of a layer or [L*D, B, H] of a stack, contiguous. With a
// projection h has P in the place of H.
template <class S>
struct State {
  S* h = nullptr;
  S* c = nullptr;
};

// Of one layer in one direction, in PyTorch's layout: w_ih [G*H, I], w_hh [G*H, H], biases [G*H] or
// null, the learned initial state h0, c0 [H] or null, and the peepholes [P*H] or null, those of i,
// f, o or, with coupled gates, f, o. With a projection w_hh is [G*H, P], h0 [P] and w_hr [P, H],
// else null. With layer normalisation the gains [G*H] of both products and, with cells, gain and
// shift [H] of c, the shift null without biases; else null.
template <class S>
struct Weights {
  S* w_ih = nullptr;
  S* w_hh = nullptr;
  S* b_ih = nullptr;
  S* b_hh = nullptr;
  S* w_hr = nullptr;
  S* h0 = nullptr;
  S* c0 = nullptr;
  S* peephole = nullptr;
  S* gain_ih = nullptr;
  S* gain_hh = nullptr;
  S* gain_c = nullptr;
  S* shift_c = nullptr;
};

// The same as a list, for those who treat them all alike.
constexpr int weights_a_layer = 12;
template <class S>
constexpr S* Weights<S>::* weight_member[weights_a_layer] = {
    &Weights<S>::w_ih,    &Weights<S>::w_hh,    &Weights<S>::b_ih,   &Weights<S>::b_hh,
    &Weights<S>::w_hr,    &Weights<S>::h0,      &Weights<S>::c0,     &Weights<S>::peephole,
    &Weights<S>::gain_ih, &Weights<S>::gain_hh, &Weights<S>::gain_c, &Weights<S>::shift_c};

// Of one in that list; columns 0: a vector, rows 0: this layer has none.
struct WeightShape {
  Index rows;
  Index columns;
};
constexpr WeightShape weight_shape(const LayerShape& s, int which) {
  const Index rows = gates(s.cell) * s.hidden_size;
  switch (which) {
    case 0:
      return {rows, s.input_size};
    case 1:
      return {rows, s.output_size()};
    case 4:
      return {s.proj_size, s.hidden_size};
    case 5:
      return {s.output_size(), 0};
    case 6:
      return {s.hidden_size, 0};
    case 7:
      return {peepholes(s.cell) * s.hidden_size, 0};
    case 10:
    case 11:
      return {s.hidden_size, 0};
    default:
      return {rows, 0};
  }
}

enum class Loss { cross_entropy, mse };

}  // namespace fastbptt
