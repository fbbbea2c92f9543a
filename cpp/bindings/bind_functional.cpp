// The verbs over memory of another array library, for adapters that keep their own tensors and
// tape.
//
// Arrays come as addresses: to make NumPy arrays of the twenty tensors of a training step takes as
// long as a small step itself. So nothing here can be checked but numbers; shapes, dtypes and
// lifetimes are the adapter's to guarantee.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "arrays.h"
#include "cells.h"
#include "concepts.h"
#include "fastbptt/buffer.h"
#include "fastbptt/runtime.h"

namespace fastbptt::bindings {
namespace {

using Address = std::uintptr_t;  // 0: no array

// Address of the first element, then the strides of time and batch in elements.
using SequenceAddress = std::tuple<Address, Index, Index>;

template <class S>
S* at(Address address) {
  return reinterpret_cast<S*>(address);
}

// The lengths of the rows of a packed sequence; none for null, which stands for a padded one.
std::vector<Index> lengths_of(Index T, Index B, const std::int64_t* batch_sizes) {
  if (T < 1 || B < 1) throw py::value_error("T and B: wanted at least 1");
  std::vector<Index> lengths;
  Index rows = B;
  for (Index t = 0; t < T && batch_sizes; ++t) {
    const Index n = static_cast<Index>(batch_sizes[t]);
    if (n < 1 || n > rows || (t == 0 && n != B)) {
      throw py::value_error("batch_sizes: got " + std::to_string(n) + " at step " +
                            std::to_string(t) + ", wanted from 1 to " + std::to_string(rows));
    }
    if (t == 0) lengths.assign(B, T);
    std::fill(lengths.begin() + n, lengths.begin() + rows, t);
    rows = n;
  }
  return lengths;
}

// The sum of the sizes; -1 if they are not those of a packed sequence.
Index packed_rows(Address batch_sizes, Index T) {
  const std::int64_t* const sizes = at<const std::int64_t>(batch_sizes);
  Index sum = 0;
  for (Index t = 0; t < T; ++t) {
    if (sizes[t] < 1 || (t > 0 && sizes[t] > sizes[t - 1])) return -1;
    sum += static_cast<Index>(sizes[t]);
  }
  return sum;
}

class Verbs {
 public:
  Verbs(const std::string& cell, Index input_size, Index hidden_size, Index num_layers,
        Index directions, Index proj_size, bool is_double)
      : shape_{cell_of(cell), input_size, hidden_size, num_layers, directions, 0, proj_size},
        is_double_(is_double) {
    if (input_size < 1 || hidden_size < 1 || num_layers < 1 || directions < 1 || directions > 2) {
      throw py::value_error(
          "input_size, hidden_size, num_layers: wanted at least 1; directions: 1 or 2");
    }
    check_projection(shape_);
  }

  Index tape_size(Index T, Index B, Address batch_sizes) const {
    if (!batch_sizes) return fastbptt::tape_size(shape_, T, B);
    const std::vector<Index> lengths = lengths_of(T, B, at<const std::int64_t>(batch_sizes));
    return fastbptt::tape_size(shape_, {T, B, lengths.data(), true});
  }

  // The memory of a tape, with the care that the library takes of its own: large ones are made of
  // huge pages, and wait for the next training step.
  py::array new_tape(Index size) const {
    return is_double_ ? new_array<double>({size}) : new_array<float>({size});
  }

  void forward(Index T, Index B, Address batch_sizes, const SequenceAddress& x, Address h,
               Address c, const std::vector<Address>& weights, const SequenceAddress& y,
               Address last_h, Address last_c, Address tape, int threads) const {
    const std::vector<Index> lengths = lengths_of(T, B, at<const std::int64_t>(batch_sizes));
    const auto run = [&](auto zero) {
      using S = decltype(zero);
      const Forward<S> call{T,
                            sequence<const S>(x),
                            {at<const S>(h), at<const S>(c)},
                            sequence<S>(y),
                            {at<S>(last_h), at<S>(last_c)}};
      in_session<S>(
          batch(T, B, lengths), weights, threads, [&](Session<S>& session, Interrupt interrupt) {
            S* const kept = at<S>(tape);
            // Without tape record and advance are the same for a cell that needs none.
            kept ? session.record(call, kept, interrupt) : session.advance(call, interrupt);
          });
    };
    is_double_ ? run(0.0) : run(0.0f);
  }

  void backward(Index T, Index B, Address batch_sizes, const SequenceAddress& x, Address h,
                Address c, const std::vector<Address>& weights, const SequenceAddress& y,
                Address tape, const SequenceAddress& grad_y, Address grad_last_h,
                Address grad_last_c, const SequenceAddress& grad_x, Address grad_h, Address grad_c,
                const std::vector<Address>& grad_weights, int threads) const {
    const std::vector<Index> lengths = lengths_of(T, B, at<const std::int64_t>(batch_sizes));
    const auto run = [&](auto zero) {
      using S = decltype(zero);
      const std::vector<Weights<S>> to = layers<S>(grad_weights);
      const auto frozen = std::make_unique<bool[]>(to.size());
      for (std::size_t k = 0; k < to.size(); ++k) frozen[k] = !to[k].w_ih;
      State<S> grad_initial{at<S>(grad_h), at<S>(grad_c)};
      const Index size = shape_.layers() * B * shape_.hidden_size;
      const Buffer<S> unwanted(grad_initial.h ? 0 : 2 * size);
      if (!grad_initial.h) grad_initial = {unwanted.data(), unwanted.data() + size};
      const Forward<S> call{
          T, sequence<const S>(x), {at<const S>(h), at<const S>(c)}, sequence<S>(y), {}};
      const Reverse<S> grad{at<const S>(tape),
                            sequence<const S>(grad_y),
                            {at<const S>(grad_last_h), at<const S>(grad_last_c)},
                            sequence<S>(grad_x),
                            grad_initial,
                            frozen.get()};
      in_session<S>(batch(T, B, lengths), weights, threads,
                    [&](Session<S>& session, Interrupt interrupt) {
                      session.reverse(call, grad, interrupt);
                      session.finish(to.data());
                    });
    };
    is_double_ ? run(0.0) : run(0.0f);
  }

 private:
  static Batch batch(Index T, Index B, const std::vector<Index>& lengths) {
    const bool packed = !lengths.empty();
    return {T, B, packed ? lengths.data() : nullptr, packed};
  }

  template <class S>
  static Sequence<S> sequence(const SequenceAddress& whole) {
    const auto [address, step, row] = whole;
    return {at<S>(address), step, row};
  }

  template <class S, class F>
  void in_session(const Batch& batch, const std::vector<Address>& weights, int threads,
                  F&& work) const {
    const std::vector<Weights<const S>> own = layers<const S>(weights);
    without_gil([&](Interrupt interrupt) {
      const ThreadLimit limit(threads);
      Session<S> session(shape_, own.data(), batch);
      work(session, interrupt);
    });
  }

  template <class S>
  std::vector<Weights<S>> layers(const std::vector<Address>& weights) const {
    if (weights.size() != std::size_t(weights_a_layer * shape_.layers())) {
      throw py::value_error("weights: got " + std::to_string(weights.size()) + ", wanted " +
                            std::to_string(weights_a_layer) + " of " +
                            std::to_string(shape_.layers()) + " layers");
    }
    std::vector<Weights<S>> found(shape_.layers());
    for (std::size_t i = 0; i < weights.size(); ++i) {
      found[i / weights_a_layer].*weight_member<S>[i % weights_a_layer] = at<S>(weights[i]);
    }
    return found;
  }

  StackShape shape_;
  bool is_double_;
};

}  // namespace

void bind_functional(py::module_& m) {
  m.def("packed_rows", &packed_rows, py::arg("batch_sizes"), py::arg("T"));
  py::class_<Verbs>(m, "Verbs")
      .def(py::init<const std::string&, Index, Index, Index, Index, Index, bool>(), py::arg("cell"),
           py::arg("input_size"), py::arg("hidden_size"), py::arg("num_layers"),
           py::arg("directions"), py::arg("proj_size"), py::arg("is_double"))
      .def("tape_size", &Verbs::tape_size, py::arg("T"), py::arg("B"), py::arg("batch_sizes") = 0)
      .def("new_tape", &Verbs::new_tape, py::arg("size"))
      .def("forward", &Verbs::forward, py::arg("T"), py::arg("B"), py::arg("batch_sizes"),
           py::arg("x"), py::arg("h"), py::arg("c"), py::arg("weights"), py::arg("y"),
           py::arg("last_h"), py::arg("last_c"), py::arg("tape"), py::arg("threads"))
      .def("backward", &Verbs::backward, py::arg("T"), py::arg("B"), py::arg("batch_sizes"),
           py::arg("x"), py::arg("h"), py::arg("c"), py::arg("weights"), py::arg("y"),
           py::arg("tape"), py::arg("grad_y"), py::arg("grad_last_h"), py::arg("grad_last_c"),
           py::arg("grad_x"), py::arg("grad_h"), py::arg("grad_c"), py::arg("grad_weights"),
           py::arg("threads"));
}

}  // namespace fastbptt::bindings
