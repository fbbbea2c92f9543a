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

// Steps with the same rows. A padded batch is one block, a packed one as many as there are
// different lengths; the rows of each are a prefix of the rows of the one before.
struct Block {
  Index T;
  Index B;
  Index first;  // rows of time x batch before it
};

std::vector<Block> blocks_of(Index T, Index B, const std::int64_t* batch_sizes) {
  if (T < 1 || B < 1) throw py::value_error("T and B: wanted at least 1");
  if (!batch_sizes) return {{T, B, 0}};
  std::vector<Block> blocks;
  Index rows = B, first = 0;
  for (Index t = 0; t < T; ++t) {
    const Index n = static_cast<Index>(batch_sizes[t]);
    if (n < 1 || n > rows || (t == 0 && n != B)) {
      throw py::value_error("batch_sizes: got " + std::to_string(n) + " at step " +
                            std::to_string(t) + ", wanted from 1 to " + std::to_string(rows));
    }
    if (t == 0 || n < rows) blocks.push_back({0, n, first});
    ++blocks.back().T;
    first += n;
    rows = n;
  }
  return blocks;
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

// Copies the first n rows of every layer of a state.
template <class S>
void copy_rows(Index L, Index n, Index H, const S* from, Index from_B, S* to, Index to_B) {
  for (Index l = 0; l < L; ++l) {
    std::copy_n(from + l * from_B * H, n * H, to + l * to_B * H);
  }
}

class Verbs {
 public:
  Verbs(const std::string& cell, Index input_size, Index hidden_size, Index num_layers,
        bool is_double, bool reversed)
      : shape_{cell_of(cell), input_size, hidden_size, num_layers},
        is_double_(is_double),
        reversed_(reversed) {
    if (input_size < 1 || hidden_size < 1 || num_layers < 1) {
      throw py::value_error("input_size, hidden_size, num_layers: wanted at least 1");
    }
  }

  Index tape_size(Index T, Index B, Address batch_sizes) const {
    const std::vector<Block> blocks = blocks_of(T, B, at<const std::int64_t>(batch_sizes));
    Index size = 0;
    for (const Block& block : blocks) size += block_tape_size(block, blocks.size());
    return size;
  }

  // The memory of a tape, with the care that the library takes of its own: large ones are made of
  // huge pages, and wait for the next training step.
  py::array new_tape(Index size) const {
    return is_double_ ? new_tape_of<double>(size) : new_tape_of<float>(size);
  }

  void forward(Index T, Index B, Address batch_sizes, const SequenceAddress& x, Address h,
               Address c, const std::vector<Address>& weights, const SequenceAddress& y,
               Address last_h, Address last_c, Address tape, int threads) const {
    const std::vector<Block> blocks = blocks_of(T, B, at<const std::int64_t>(batch_sizes));
    const auto run = [&](auto zero) {
      using S = decltype(zero);
      forward_of<S>(blocks, x, {at<const S>(h), at<const S>(c)}, weights, y,
                    {at<S>(last_h), at<S>(last_c)}, at<S>(tape), threads);
    };
    is_double_ ? run(0.0) : run(0.0f);
  }

  void backward(Index T, Index B, Address batch_sizes, const SequenceAddress& x, Address h,
                Address c, const std::vector<Address>& weights, const SequenceAddress& y,
                Address tape, const SequenceAddress& grad_y, Address grad_last_h,
                Address grad_last_c, const SequenceAddress& grad_x, Address grad_h, Address grad_c,
                const std::vector<Address>& grad_weights, int threads) const {
    const std::vector<Block> blocks = blocks_of(T, B, at<const std::int64_t>(batch_sizes));
    const auto run = [&](auto zero) {
      using S = decltype(zero);
      backward_of<S>(blocks, x, {at<const S>(h), at<const S>(c)}, weights, y, at<const S>(tape),
                     grad_y, {at<const S>(grad_last_h), at<const S>(grad_last_c)}, grad_x,
                     {at<S>(grad_h), at<S>(grad_c)}, grad_weights, threads);
    };
    is_double_ ? run(0.0) : run(0.0f);
  }

 private:
  Index state_size(Index B) const { return shape_.num_layers * B * shape_.hidden_size; }
  bool has_cell() const { return has_cell_state(shape_.cell); }

  // Behind the steps of each of several blocks lies the state that it began with.
  Index block_tape_size(const Block& block, std::size_t blocks) const {
    const Index states = blocks == 1 ? 0 : state_size(block.B) * (has_cell() ? 2 : 1);
    return fastbptt::tape_size(shape_, block.T, block.B) + states;
  }

  template <class S>
  py::array new_tape_of(Index size) const {
    auto buffer = std::make_unique<Buffer<S>>(size);
    S* const data = buffer->data();
    py::capsule owner(buffer.get(), [](void* p) { delete static_cast<Buffer<S>*>(p); });
    buffer.release();
    return py::array(py::dtype::of<S>(), std::vector<Index>{size}, data, owner);
  }

  // A block's part of a sequence; backwards, the last step comes first.
  template <class S>
  Sequence<S> part(const SequenceAddress& whole, const Block& block, std::size_t blocks) const {
    auto [address, step, row] = whole;
    if (!address) return {};
    if (blocks > 1) step = block.B * row;
    S* data = at<S>(address) + block.first * row;
    if (reversed_) {
      data += (block.T - 1) * step;
      step = -step;
    }
    return {data, step, row};
  }

  template <class S>
  std::vector<Weights<S>> layers(const std::vector<Address>& weights) const {
    if (weights.size() != std::size_t(4 * shape_.num_layers)) {
      throw py::value_error("weights: got " + std::to_string(weights.size()) + ", wanted four of " +
                            std::to_string(shape_.num_layers) + " layers");
    }
    std::vector<Weights<S>> found;
    for (std::size_t i = 0; i < weights.size(); i += 4) {
      found.push_back(
          {at<S>(weights[i]), at<S>(weights[i + 1]), at<S>(weights[i + 2]), at<S>(weights[i + 3])});
    }
    return found;
  }

  // The rows of a block out of a state of all rows, and back.
  template <class S, class T>
  void gather(Index n, const State<S>& all, Index B, const State<T>& some) const {
    const Index L = shape_.num_layers, H = shape_.hidden_size;
    copy_rows<T>(L, n, H, all.h, B, some.h, n);
    if (has_cell()) copy_rows<T>(L, n, H, all.c, B, some.c, n);
  }
  template <class S>
  void scatter(Index n, const State<S>& some, const State<S>& all, Index B) const {
    const Index L = shape_.num_layers, H = shape_.hidden_size;
    copy_rows<S>(L, n, H, some.h, n, all.h, B);
    if (has_cell()) copy_rows<S>(L, n, H, some.c, n, all.c, B);
  }

  template <class S>
  State<S> state_at(S* data, Index B) const {
    return {data, has_cell() ? data + state_size(B) : nullptr};
  }

  template <class S>
  void start(const State<const S>& from, const State<S>& to, Index B) const {
    const auto copy = [n = state_size(B)](const S* source, S* target) {
      source ? std::copy_n(source, n, target) : std::fill_n(target, n, S(0));
    };
    copy(from.h, to.h);
    if (has_cell()) copy(from.c, to.c);
  }

  // Calls body(block, its tape) for each block, in the order of time of this direction or against
  // it.
  template <class S, class F>
  void for_blocks(const std::vector<Block>& blocks, S* tape, bool ascending, F&& body) const {
    std::vector<S*> tapes;
    for (const Block& block : blocks) {
      tapes.push_back(tape);
      if (tape) tape += block_tape_size(block, blocks.size());
    }
    const Index n = static_cast<Index>(blocks.size());
    for (Index i = 0; i < n; ++i) {
      const Index k = ascending ? i : n - 1 - i;
      body(blocks[k], tapes[k]);
    }
  }

  template <class S>
  void forward_of(const std::vector<Block>& blocks, const SequenceAddress& x,
                  const State<const S>& initial, const std::vector<Address>& weights,
                  const SequenceAddress& y, const State<S>& last, S* tape, int threads) const {
    const std::vector<Weights<const S>> w = layers<const S>(weights);
    const std::size_t count = blocks.size();
    const Index B = blocks[0].B;
    const auto run = [&](const Block& block, const State<const S>& from, const State<S>& to,
                         S* steps, Interrupt interrupt) {
      const Forward<S> call{block.T, part<const S>(x, block, count), from, part<S>(y, block, count),
                            to};
      Session<S> session(shape_, w.data(), block.T, block.B);
      steps ? session.record(call, steps, interrupt) : session.advance(call, interrupt);
    };
    without_gil([&](Interrupt interrupt) {
      const ThreadLimit limit(threads);
      // Without tape record and advance are the same for a cell that needs none but y.
      if (count == 1) return run(blocks[0], initial, last, tape, interrupt);
      start(initial, last, B);
      const Index size = state_size(B) * (has_cell() ? 2 : 1);
      const Buffer<S> before(tape ? 0 : size), after(size);
      for_blocks(blocks, tape, !reversed_, [&](const Block& block, S* own) {
        S* const kept = own ? own + fastbptt::tape_size(shape_, block.T, block.B) : before.data();
        const State<S> from = state_at(kept, block.B), to = state_at(after.data(), block.B);
        gather(block.B, last, B, from);
        run(block, {from.h, from.c}, to, own, interrupt);
        scatter(block.B, to, last, B);
      });
    });
  }

  template <class S>
  void backward_of(const std::vector<Block>& blocks, const SequenceAddress& x,
                   const State<const S>& initial, const std::vector<Address>& weights,
                   const SequenceAddress& y, const S* tape, const SequenceAddress& grad_y,
                   const State<const S>& grad_last, const SequenceAddress& grad_x,
                   const State<S>& wanted_initial, const std::vector<Address>& grad_weights,
                   int threads) const {
    const std::vector<Weights<const S>> w = layers<const S>(weights);
    const std::vector<Weights<S>> grad_w = layers<S>(grad_weights);
    const auto frozen = std::make_unique<bool[]>(grad_w.size());
    for (std::size_t l = 0; l < grad_w.size(); ++l) frozen[l] = !grad_w[l].w_ih;
    const std::size_t count = blocks.size();
    const Index B = blocks[0].B, size = state_size(B) * (has_cell() ? 2 : 1);
    const Buffer<S> unwanted(wanted_initial.h ? 0 : size);
    const State<S> grad_initial = wanted_initial.h ? wanted_initial : state_at(unwanted.data(), B);
    const auto run = [&](const Block& block, const State<const S>& from, const S* steps,
                         const State<const S>& grad_to, const State<S>& grad_from,
                         Interrupt interrupt) {
      const Forward<S> call{
          block.T, part<const S>(x, block, count), from, part<S>(y, block, count), {}};
      const Reverse<S> grad{steps,     part<const S>(grad_y, block, count),
                            grad_to,   part<S>(grad_x, block, count),
                            grad_from, frozen.get()};
      Session<S> session(shape_, w.data(), block.T, block.B);
      session.reverse(call, grad, interrupt);
      session.finish(grad_w.data());
    };
    without_gil([&](Interrupt interrupt) {
      const ThreadLimit limit(threads);
      if (count == 1) return run(blocks[0], initial, tape, grad_last, grad_initial, interrupt);
      start(grad_last, grad_initial, B);
      const Buffer<S> after(size), before(size);
      for_blocks(blocks, tape, reversed_, [&](const Block& block, const S* own) {
        const State<const S> from =
            state_at(own + fastbptt::tape_size(shape_, block.T, block.B), block.B);
        const State<S> grad_to = state_at(after.data(), block.B);
        const State<S> grad_from = state_at(before.data(), block.B);
        gather(block.B, grad_initial, B, grad_to);
        run(block, from, own, {grad_to.h, grad_to.c}, grad_from, interrupt);
        scatter(block.B, grad_from, grad_initial, B);
      });
    });
  }

  StackShape shape_;
  bool is_double_;
  bool reversed_;
};

}  // namespace

void bind_functional(py::module_& m) {
  m.def("packed_rows", &packed_rows, py::arg("batch_sizes"), py::arg("T"));
  py::class_<Verbs>(m, "Verbs")
      .def(py::init<const std::string&, Index, Index, Index, bool, bool>(), py::arg("cell"),
           py::arg("input_size"), py::arg("hidden_size"), py::arg("num_layers"),
           py::arg("is_double"), py::arg("reversed"))
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
