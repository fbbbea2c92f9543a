// The names that cells and precisions have in Python.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "fastbptt/recurrent.h"

namespace fastbptt::bindings {

inline Cell cell_of(const std::string& name) {
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  if (name == "rnn_relu") return Cell::rnn_relu;
  if (name == "lstm") return Cell::lstm;
  if (name == "gru") return Cell::gru;
  if (name == "gru_reset_before") return Cell::gru_reset_before;
  if (name == "lstm_coupled") return Cell::lstm_coupled;
  throw pybind11::value_error(
      "cell: got '" + name +
      "', wanted rnn_tanh, rnn_relu, lstm, lstm_coupled, gru or gru_reset_before");
}

inline MatmulPrecision precision_of(const std::string& name) {
  if (name == "highest") return MatmulPrecision::highest;
  if (name == "high") return MatmulPrecision::high;
  if (name == "medium") return MatmulPrecision::medium;
  throw pybind11::value_error("precision: got '" + name +
                              "', wanted 'highest', 'high' or 'medium'");
}

inline const char* name_of(MatmulPrecision precision) {
  switch (precision) {
    case MatmulPrecision::high:
      return "high";
    case MatmulPrecision::medium:
      return "medium";
    default:
      return "highest";
  }
}

inline void check_projection(const StackShape& shape) {
  const bool fits = shape.proj_size >= 0 && shape.proj_size < shape.hidden_size;
  if (!fits || (shape.proj_size > 0 && !has_cell_state(shape.cell))) {
    throw pybind11::value_error("proj_size: got " + std::to_string(shape.proj_size) +
                                ", wanted 0, or for an LSTM less than hidden_size");
  }
}

}  // namespace fastbptt::bindings
