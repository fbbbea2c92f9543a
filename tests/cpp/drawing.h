// What the programs here draw: numbers, sizes, and a stack of layers with all its arrays.
//
// Arrays are blocks of the heap of just the size that the API asks for, so that AddressSanitizer
// sees any step outside them; what a call must write starts as NaN.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastbptt/recurrent.h"
#include "fastbptt/runtime.h"

namespace fastbptt::tests {

class Random {
 public:
  explicit Random(unsigned long seed) : engine_(seed) {}
  Index between(Index least, Index most) {
    return std::uniform_int_distribution<Index>(least, most)(engine_);
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  double normal() { return std::normal_distribution<double>()(engine_); }
  double uniform(double bound) {
    return std::uniform_real_distribution<double>(-bound, bound)(engine_);
  }

 private:
  std::mt19937_64 engine_;
};

template <class S>
constexpr S nan = std::numeric_limits<S>::quiet_NaN();
template <>
inline constexpr Bfloat16 nan<Bfloat16>{0x7fc0};

// The value of type S next to a number, and the number that it is.
template <class S>
S nearest(double number) {
  if constexpr (std::is_same_v<S, Bfloat16>) {
    int exponent;
    const double digits = std::frexp(number, &exponent);  // of which 8 stay
    return narrowed(float(std::ldexp(std::nearbyint(std::ldexp(digits, 8)), exponent - 8)));
  } else {
    return static_cast<S>(number);
  }
}
inline double number(Bfloat16 value) { return double(widened(value)); }
template <class S>
double number(S value) {
  return static_cast<double>(value);
}

template <class S>
class Array {
 public:
  Array() = default;
  // `offset` elements in front, so that the data is aligned to an element and no better.
  explicit Array(Index size, Index offset = 0)
      : size_(size), offset_(offset), block_(new S[size + offset]) {
    fill(nan<S>);
  }
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;
  S* data() const { return block_ ? block_.get() + offset_ : nullptr; }
  Index size() const { return size_; }
  S& operator[](Index i) const { return data()[i]; }
  void fill(S value) const {
    for (Index i = 0; i < size_; ++i) data()[i] = value;
  }
  template <class Draw>
  void draw(Draw&& next) const {
    for (Index i = 0; i < size_; ++i) data()[i] = nearest<S>(next());
  }
  std::vector<double> doubles() const {
    std::vector<double> values(size_);
    for (Index i = 0; i < size_; ++i) values[i] = number(data()[i]);
    return values;
  }

 private:
  Index size_ = 0;
  Index offset_ = 0;
  std::unique_ptr<S[]> block_;
};

enum class Layout { time_major, batch_first, padded, back_to_front };

// [T, B, F] in one of the layouts that the API takes. In a padded one NaN lies between the rows.
template <class S>
class SequenceArray {
 public:
  SequenceArray() = default;
  SequenceArray(Layout layout, Index T, Index B, Index F, Index offset) : T_(T), B_(B), F_(F) {
    const Index gap = layout == Layout::padded ? 3 : 0;
    const bool batch_first = layout == Layout::batch_first;
    const Index row = batch_first ? T * F : F + gap, step = batch_first ? F : B * row + gap;
    const Index last = T > 0 ? (T - 1) * step + (B - 1) * row + F : 0;
    array_ = Array<S>(last, offset);
    const bool backwards = layout == Layout::back_to_front && T > 0;
    view_ = {array_.data() + (backwards ? (T - 1) * step : 0), backwards ? -step : step, row};
  }
  Sequence<S> view() const { return view_; }
  Sequence<const S> const_view() const { return {view_.data, view_.step, view_.row}; }
  const Array<S>& array() const { return array_; }
  template <class F>
  void for_each(F&& body) const {
    for (Index t = 0; t < T_; ++t)
      for (Index b = 0; b < B_; ++b)
        for (Index f = 0; f < F_; ++f) body(view_.at(t, b)[f]);
  }
  std::vector<double> doubles() const {
    std::vector<double> values;
    for_each([&](S value) { values.push_back(number(value)); });
    return values;
  }
  // Of what lies between the rows, which nobody may write.
  bool gaps_untouched() const {
    Index numbers = 0, written = 0;
    for (Index i = 0; i < array_.size(); ++i) numbers += !std::isnan(number(array_[i]));
    for_each([&](S value) { written += !std::isnan(number(value)); });
    return numbers == written;
  }

 private:
  Index T_ = 0;
  Index B_ = 0;
  Index F_ = 0;
  Array<S> array_;
  Sequence<S> view_;
};

// h and c, c for the LSTM only.
template <class S>
struct StateArrays {
  Array<S> h;
  Array<S> c;
  StateArrays() = default;
  StateArrays(const StackShape& s, Index B, Index offset)
      : h(s.layers() * B * s.output_size(), offset) {
    if (has_cell_state(s.cell)) c = Array<S>(s.layers() * B * s.hidden_size, offset);
  }
  State<S> view() const { return {h.data(), c.data()}; }
  State<const S> const_view() const { return {h.data(), c.data()}; }
};

// The weights of every layer in the order of weight_member; those that it has not are null.
template <class S>
struct WeightArrays {
  std::vector<Array<S>> arrays;
  WeightArrays() = default;
  WeightArrays(const StackShape& s, bool bias, Index offset) {
    const bool norm = s.options.layer_norm, cells = has_cell_state(s.cell);
    const bool there[weights_a_layer] = {true,
                                         true,
                                         bias,
                                         bias,
                                         s.proj_size > 0,
                                         false,
                                         false,
                                         s.options.peephole,
                                         norm,
                                         norm,
                                         norm && cells,
                                         norm && cells && bias};
    for (Index l = 0; l < s.layers(); ++l) {
      for (int i = 0; i < weights_a_layer; ++i) {
        const auto [rows, columns] = weight_shape(s.layer(l), i);
        arrays.push_back(there[i] ? Array<S>(columns > 0 ? rows * columns : rows, offset)
                                  : Array<S>());
      }
    }
  }
  template <class T = S>
  std::vector<Weights<T>> views() const {
    std::vector<Weights<T>> all(arrays.size() / weights_a_layer);
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      all[i / weights_a_layer].*weight_member<T>[i % weights_a_layer] = arrays[i].data();
    }
    return all;
  }
};

inline const char* name_of(Cell cell) {
  switch (cell) {
    case Cell::rnn_tanh:
      return "rnn_tanh";
    case Cell::rnn_relu:
      return "rnn_relu";
    case Cell::lstm:
      return "lstm";
    case Cell::gru:
      return "gru";
    case Cell::gru_reset_before:
      return "gru_reset_before";
    case Cell::lstm_coupled:
      return "lstm_coupled";
  }
  return "?";
}

// The number that argument i gives, or else a default.
inline unsigned long argument(int argc, char** argv, int i, unsigned long otherwise) {
  if (i >= argc) return otherwise;
  char* end = nullptr;
  const unsigned long value = std::strtoul(argv[i], &end, 10);
  if (end != argv[i] && *end == '\0') return value;
  std::fprintf(stderr, "argument %d: got '%s', wanted a whole number\n", i, argv[i]);
  std::exit(2);
}

// The instruction set that runs. The program ends with 77 where FASTBPTT_ISA names one that this
// machine has not.
inline std::string isa_or_exit() {
  try {
    return cpu_info().isa;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    std::exit(77);
  }
}

}  // namespace fastbptt::tests
