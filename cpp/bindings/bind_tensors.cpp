// The verbs over tensors of another library, for adapters that keep their own tensors and tape.
//
// A call reads all it needs of its tensors at once (dlpack.h) and checks it: nothing is kept from
// one to the next, so tensors may be replaced, moved and resized in between.
//
// A run in bfloat16 has float32 states and gradients inside (recurrent.h). Tensors become what the
// core takes in `settle`, and what the caller wants in `cast`: nowhere else is anything rounded.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "arrays.h"
#include "cells.h"
#include "concepts.h"
#include "dlpack.h"
#include "fastbptt/runtime.h"

namespace fastbptt::bindings {
namespace {

// What both ways through time read: the shape of the stack, the input, the state that it begins
// with, and the weights in torch's order, those of a layer and direction side by side.
struct Inputs {
  StackShape shape;
  Dtype dtype;               // of x, y and the weights, as the core takes them
  std::vector<Dtype> given;  // that of x, h, c and each weight, as they came
  Index T, B;
  View x, h, c;  // h and c may be null
  std::vector<View> weights;
  std::vector<Index> lengths;  // of a packed sequence
  bool packed = false;

  Batch batch() const { return {T, B, packed ? lengths.data() : nullptr, packed}; }
  // Of states, gradients and the tape.
  Dtype wide() const { return dtype == Dtype::bfloat16 ? Dtype::float32 : dtype; }
  // Calls work with a value of the type of x, y and the weights.
  template <class F>
  void by_type(F&& work) const {
    if (dtype == Dtype::float64) return work(double{});
    if (dtype == Dtype::bfloat16) return work(Bfloat16{});
    work(float{});
  }
  Index tape_size() const {
    return dtype == Dtype::bfloat16 ? fastbptt::tape_size<Bfloat16>(shape, batch())
                                    : fastbptt::tape_size(shape, batch());
  }
};

bool is_float32_or_bfloat16(Dtype dtype) {
  return dtype == Dtype::float32 || dtype == Dtype::bfloat16;
}

class Verbs {
 public:
  // `autocast` is the dtype that h has from step to step where tensors may be float32 and bfloat16
  // side by side; empty: all are of one dtype, and so is h.
  Verbs(const py::type& tensor, const py::type& parameter, const std::string& cell, bool bias,
        bool batch_first, Index directions, bool projected, const std::string& autocast)
      : tensors_(tensor, parameter),
        cell_(cell_of(cell)),
        bias_(bias),
        batch_first_(batch_first),
        directions_(directions),
        projected_(projected) {
    if (directions < 1 || directions > 2) {
      throw py::value_error("directions: got " + std::to_string(directions) + ", wanted 1 or 2");
    }
    if (projected && cell_ != Cell::lstm) {
      throw py::value_error("projected: got " + cell + ", wanted an LSTM");
    }
    if (!autocast.empty() && autocast != "float32" && autocast != "bfloat16") {
      throw py::value_error("autocast: got '" + autocast +
                            "', wanted 'float32', 'bfloat16' or nothing");
    }
    if (!autocast.empty()) {
      autocast_ = autocast == "bfloat16" ? Dtype::bfloat16 : Dtype::float32;
    }
    members_ = {0, 1};
    if (bias) members_.insert(members_.end(), {2, 3});
    if (projected) members_.push_back(4);
  }

  // What the core cannot take of these, or an empty text. A class of tensors of its own may do
  // more than hold memory, which only torch's own operations would let it do.
  std::string problem(py::handle x, py::handle h, py::handle c, const py::object& weights,
                      py::handle batch_sizes) const {
    const py::tuple all(weights);
    const auto plain = [&](py::handle t) { return t.is_none() || tensors_.is_plain(t); };
    if (!plain(x) || !plain(h) || !plain(c) || !std::all_of(all.begin(), all.end(), plain)) {
      return "wanted plain tensors, and none of a class of its own";
    }
    Inputs inputs;
    return read(inputs, x, h, c, all, batch_sizes);
  }

  // Whether each of these gradients is None or lies in memory: one may stand for many, or for
  // zeros.
  bool can_read(const py::tuple& gradients) const {
    return std::all_of(gradients.begin(), gradients.end(), [&](py::handle gradient) {
      View view;
      return gradient.is_none() || tensors_.read(gradient, view);
    });
  }

  Index tape_size(Index T, Index B, Index input_size, Index hidden_size, Index num_layers,
                  Index proj_size) const {
    return fastbptt::tape_size(shape(input_size, hidden_size, num_layers, proj_size), T, B);
  }

  py::tuple forward(py::handle x, py::handle h, py::handle c, const py::object& weights,
                    py::handle batch_sizes, bool keep, int threads) const {
    Inputs in;
    const Kept kept = inputs(in, x, h, c, weights, batch_sizes);
    const Index L = in.shape.layers(), D = in.shape.directions;
    const Index R = in.shape.output_size();
    const Dtype wide = in.wide();
    View y_at, h_at, c_at;
    const py::object y = tensors_.empty(in.dtype, with_last_axis(in.x, D * R), y_at);
    py::object last_h = tensors_.empty(wide, of_shape({L, in.B, R}), h_at);
    py::object last_c = py::none();
    if (has_cell_state(cell_)) {
      last_c = tensors_.empty(wide, of_shape({L, in.B, in.shape.hidden_size}), c_at);
    }
    py::object tape = py::none();
    in.by_type([&](auto type) {
      using E = decltype(type);
      using S = Arithmetic<E>;
      S* kept_at = nullptr;
      if (keep) {
        View tape_at;
        tape = tensors_.empty(wide, of_shape({in.tape_size()}), tape_at);
        kept_at = tape_at.at<S>();
      }
      const Forward<E> call{in.T,
                            sequence<const E>(in, in.x),
                            {in.h.at<const S>(), in.c.at<const S>()},
                            sequence<E>(in, y_at),
                            {h_at.at<S>(), c_at.at<S>()}};
      in_session<E>(in, threads, [&](Session<E>& session, Interrupt interrupt) {
        // Without tape record and advance are the same for a cell that needs none.
        kept_at ? session.record(call, kept_at, interrupt) : session.advance(call, interrupt);
      });
    });
    last_h = cast(std::move(last_h), wide, in.dtype);
    // Under autocast the projected LSTM of torch rounds h alone.
    const Dtype of_c = projected_ ? in.given[in.c ? 2 : 0] : in.dtype;
    if (has_cell_state(cell_)) last_c = cast(std::move(last_c), wide, of_c);
    return py::make_tuple(y, last_h, last_c, tape);
  }

  // `needed` says of x, h, c and each weight whether its gradient is; the others are None.
  py::tuple backward(py::handle x, py::handle h, py::handle c, const py::object& weights,
                     py::handle batch_sizes, py::handle y, py::handle tape, py::handle grad_y,
                     py::handle grad_last_h, py::handle grad_last_c, const py::sequence& needed,
                     int threads) const {
    Inputs in;
    Kept kept = inputs(in, x, h, c, weights, batch_sizes);
    const Index L = in.shape.layers(), D = in.shape.directions;
    const Index R = in.shape.output_size(), H = in.shape.hidden_size;
    const std::size_t count = 3 + in.weights.size();
    if (needed.size() != count) {
      throw std::runtime_error("needed: got " + std::to_string(needed.size()) + ", wanted " +
                               std::to_string(count));
    }
    const auto need = [&](std::size_t i) { return needed[i].cast<bool>(); };

    const View y_shape = with_last_axis(in.x, D * R);
    const Dtype wide = in.wide();
    const View y_at = given("y", y, in, in.dtype, y_shape, rows, kept);
    // As autograd has them: those of what is bfloat16 are that.
    const bool narrow = in.dtype == Dtype::bfloat16 && in.given[0] == Dtype::bfloat16;
    const Dtype outer = narrow ? Dtype::bfloat16 : wide;
    const View grad_y_at = given("grad_y", grad_y, in, outer, y_shape, rows, kept);
    const View h_shape = of_shape({L, in.B, R}), c_shape = of_shape({L, in.B, H});
    const View grad_h_at = given("grad_h", grad_last_h, in, wide, h_shape, whole, kept);
    const View grad_c_at = given("grad_c", grad_last_c, in, wide, c_shape, whole, kept);
    const Index tape_size = in.tape_size();
    const View tape_at =
        tape_size > 0 ? given("tape", tape, in, wide, of_shape({tape_size}), whole, kept) : View();
    if (!y_at || (tape_size > 0 && !tape_at)) {
      throw std::runtime_error("y, tape: got None, wanted those of forward");
    }

    py::tuple results(count);
    const auto make_as = [&](Dtype dtype, std::size_t i, const View& shape) {
      View at;
      results[i] = tensors_.empty(dtype, shape, at);
      return at;
    };
    const auto make = [&](std::size_t i, const View& shape) { return make_as(wide, i, shape); };
    for (std::size_t i = 0; i < count; ++i) results[i] = py::none();
    const View to_x = need(0) ? make_as(outer, 0, in.x) : View();
    const bool need_state = (in.h && need(1)) || (in.c && need(2));
    const View to_h = need_state ? make(1, h_shape) : View();
    const View to_c = need_state && in.c ? make(2, c_shape) : View();
    std::vector<View> to_weights(in.weights.size());
    const Index a_layer = static_cast<Index>(members_.size());
    const auto frozen = std::make_unique<bool[]>(L);
    for (Index k = 0; k < L; ++k) {
      frozen[k] = true;
      for (Index i = k * a_layer; i < (k + 1) * a_layer; ++i) frozen[k] &= !need(3 + i);
      // All matrices of a layer are computed, or none.
      for (Index i = k * a_layer; i < (k + 1) * a_layer; ++i) {
        const View& weight = in.weights[i];
        const bool wanted = weight.axes == 2 ? !frozen[k] : need(3 + i);
        if (wanted) to_weights[i] = make(3 + i, weight);
      }
    }

    in.by_type([&](auto type) {
      using E = decltype(type);
      using S = Arithmetic<E>;
      const std::vector<Weights<S>> to = layers<S>(to_weights);
      State<S> grad_initial{to_h.at<S>(), to_c.at<S>()};
      const Index size = L * in.B * H;
      const Buffer<S> unwanted(grad_initial.h ? 0 : 2 * size);
      if (!grad_initial.h) grad_initial = {unwanted.data(), unwanted.data() + size};
      const Forward<E> call{in.T,
                            sequence<const E>(in, in.x),
                            {in.h.at<const S>(), in.c.at<const S>()},
                            sequence<E>(in, y_at),
                            {}};
      const auto reverse = [&](auto grad_type) {
        using G = decltype(grad_type);
        const Reverse<S, G> grad{tape_at.at<const S>(),
                                 sequence<const G>(in, grad_y_at),
                                 {grad_h_at.at<const S>(), grad_c_at.at<const S>()},
                                 sequence<G>(in, to_x),
                                 grad_initial,
                                 frozen.get()};
        in_session<E>(in, threads, [&](Session<E>& session, Interrupt interrupt) {
          session.reverse(call, grad, interrupt);
          session.finish(to.data());
        });
      };
      if constexpr (std::is_same_v<E, Bfloat16>) {
        if (narrow) return reverse(Bfloat16{});
      }
      reverse(S{});
    });
    for (std::size_t i = 0; i < count; ++i) {
      const Dtype own = i == 0 ? outer : wide;
      if (!results[i].is_none()) results[i] = cast(results[i], own, in.given[i]);
    }
    return results;
  }

 private:
  // Copies of tensors that lie otherwise than the core takes them.
  using Kept = std::vector<py::object>;

  enum Order { rows, whole };  // dense in the last axis, or in all

  StackShape shape(Index input_size, Index hidden_size, Index num_layers, Index proj_size) const {
    return {cell_, input_size, hidden_size, num_layers, directions_, 0, proj_size};
  }

  static View of_shape(std::initializer_list<Index> shape) {
    View view;
    view.axes = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape);
    return view;
  }

  static View with_last_axis(View view, Index size) {
    view.shape[view.axes - 1] = size;
    return view;
  }

  // Whether a tensor that is given may have this dtype.
  bool takes(const Inputs& in, Dtype found) const {
    return autocast_ == Dtype::other ? found == in.dtype : is_float32_or_bfloat16(found);
  }
  std::string wanted(const Inputs& in) const {
    return autocast_ == Dtype::other ? name_of(in.dtype) : "float32 or bfloat16";
  }

  // Reads all tensors, changes none, and says what is wrong with them.
  std::string read(Inputs& in, py::handle x, py::handle h, py::handle c, const py::tuple& weights,
                   py::handle batch_sizes) const {
    in.packed = !batch_sizes.is_none();
    if (!tensors_.read(x, in.x)) {
      return "x: wanted a tensor on the CPU, of up to 3 axes, with something in it";
    }
    in.dtype = autocast_ == Dtype::other ? in.x.dtype : autocast_;
    if (!takes(in, in.x.dtype) ||
        !(in.dtype == Dtype::float64 || is_float32_or_bfloat16(in.dtype))) {
      return std::string("x: got ") + name_of(in.x.dtype) + ", wanted " +
             (autocast_ == Dtype::other ? "float32, float64 or bfloat16" : wanted(in));
    }
    if (in.x.axes != (in.packed ? 2 : 3)) {
      return "x: got " + in.x.text() + ", wanted (T, B, I), of a packed sequence (rows, I)";
    }
    if (std::string text = read_weights(in, weights); !text.empty()) return text;
    if (in.packed) {
      if (std::string text = read_batch_sizes(in, batch_sizes); !text.empty()) return text;
    } else {
      in.T = in.x.shape[batch_first_ ? 1 : 0];
      in.B = in.x.shape[batch_first_ ? 0 : 1];
    }
    if (h.is_none() && c.is_none()) return "";
    const Index L = in.shape.layers();
    if (std::string text = read_state("h", h, in, {L, in.B, in.shape.output_size()}, in.h);
        !text.empty()) {
      return text;
    }
    if (!has_cell_state(cell_)) return "";
    return read_state("c", c, in, {L, in.B, in.shape.hidden_size}, in.c);
  }

  std::string read_weights(Inputs& in, const py::tuple& weights) const {
    const Index count = static_cast<Index>(weights.size());
    const Index a_layer = static_cast<Index>(members_.size());
    if (count == 0 || count % (a_layer * directions_) != 0) {
      return "weights: got " + std::to_string(count) + ", wanted " +
             std::to_string(a_layer * directions_) + " a layer";
    }
    in.weights.resize(count);
    for (Index i = 0; i < count; ++i) {
      View& weight = in.weights[i];
      if (!tensors_.read(weights[i], weight)) {
        return "weights[" + std::to_string(i) + "]: wanted a tensor on the CPU";
      }
      if (!takes(in, weight.dtype)) {
        return "weights[" + std::to_string(i) + "]: got " + name_of(weight.dtype) + ", wanted " +
               wanted(in);
      }
    }
    const View &w_hh = in.weights[1], &last = in.weights[a_layer - 1];
    if (w_hh.axes != 2 || last.axes != (projected_ || !bias_ ? 2 : 1)) {
      return "weights: wanted matrices and, for biases, vectors";
    }
    const Index R = w_hh.shape[1], H = projected_ ? last.shape[1] : R;
    if (projected_ && R >= H) {
      return "weights: got a projection from " + std::to_string(H) + " values to " +
             std::to_string(R) + ", wanted one to fewer";
    }
    in.shape =
        shape(in.x.shape[in.x.axes - 1], H, count / a_layer / directions_, projected_ ? R : 0);
    in.shape.options.narrow_tape = in.dtype == Dtype::bfloat16;
    if (autocast_ != Dtype::other) in.shape.precision = MatmulPrecision::medium;
    for (Index i = 0; i < count; ++i) {
      const auto [n, columns] = weight_shape(in.shape.layer(i / a_layer), members_[i % a_layer]);
      const View& weight = in.weights[i];
      if (columns > 0 ? weight.has_shape({n, columns}) : weight.has_shape({n})) continue;
      return "weights[" + std::to_string(i) + "]: got " + weight.text() + ", wanted " +
             shape_text(columns > 0 ? std::vector<Index>{n, columns} : std::vector<Index>{n});
    }
    return "";
  }

  // B, T and the length of each row, the longest first.
  std::string read_batch_sizes(Inputs& in, py::handle batch_sizes) const {
    View view;
    if (!tensors_.read(batch_sizes, view) || view.dtype != Dtype::int64 || view.axes != 1 ||
        !view.is_dense(1)) {
      return "batch_sizes: wanted a dense vector of int64 on the CPU";
    }
    const auto* const sizes = view.at<const std::int64_t>();
    Index sum = 0, rows = sizes[0];
    bool fits = rows >= 1 && rows <= in.x.shape[0];
    if (fits) in.lengths.assign(rows, view.shape[0]);
    for (Index t = 0; t < view.shape[0] && fits; ++t) {
      fits = sizes[t] >= 1 && sizes[t] <= rows;
      if (!fits) break;
      std::fill(in.lengths.begin() + sizes[t], in.lengths.begin() + rows, t);
      rows = static_cast<Index>(sizes[t]);
      sum += rows;
    }
    if (!fits || sum != in.x.shape[0]) {
      return "batch_sizes: wanted a row that never rises, from 1 up, of sum " +
             std::to_string(in.x.shape[0]);
    }
    in.T = view.shape[0];
    in.B = static_cast<Index>(sizes[0]);
    return "";
  }

  std::string read_state(const char* name, py::handle state, const Inputs& in,
                         std::initializer_list<Index> shape, View& view) const {
    if (tensors_.read(state, view) && takes(in, view.dtype) && view.has_shape(shape)) return "";
    return std::string(name) + ": got " + (view ? view.text() : "no tensor on the CPU") +
           ", wanted " + wanted(in) + " " + shape_text(shape);
  }

  // Reads all tensors, and makes copies of those that lie otherwise than the core takes them.
  Kept inputs(Inputs& in, py::handle x, py::handle h, py::handle c, const py::object& weights,
              py::handle batch_sizes) const {
    const py::tuple all(weights);
    const std::string text = read(in, x, h, c, all, batch_sizes);
    if (!text.empty()) throw std::runtime_error(text);
    in.given = {in.x.dtype, in.h ? in.h.dtype : in.wide(), in.c ? in.c.dtype : in.wide()};
    for (const View& weight : in.weights) in.given.push_back(weight.dtype);
    Kept kept;
    settle(x, in.x, rows, in.dtype, kept);
    // h is rounded to what bfloat16 has, as the core rounds it from then on.
    if (in.h) {
      const py::object rounded = settle(h, in.h, whole, in.dtype, kept);
      if (in.wide() != in.dtype) settle(rounded, in.h, whole, in.wide(), kept);
    }
    if (in.c) settle(c, in.c, whole, in.wide(), kept);
    for (std::size_t i = 0; i < in.weights.size(); ++i) {
      settle(all[i], in.weights[i], whole, in.dtype, kept);
    }
    return kept;
  }

  // A tensor that came back from autograd or from the caller's hooks; None has no data.
  View given(const char* name, py::handle tensor, const Inputs& in, Dtype dtype, const View& shape,
             Order order, Kept& kept) const {
    View view;
    if (tensor.is_none()) return view;
    if (!tensors_.read(tensor, view)) {
      throw std::runtime_error(std::string(name) + ": wanted a tensor with memory on the CPU");
    }
    // Torch gives gradients of results in the results' dtype.
    const bool narrow = dtype != in.dtype && view.dtype == in.dtype;
    const bool fits = (view.dtype == dtype || narrow) && view.axes == shape.axes &&
                      std::equal(view.shape, view.shape + view.axes, shape.shape);
    if (!fits) {
      View wanted = shape;
      wanted.dtype = dtype;
      throw std::runtime_error(std::string(name) + ": got " + view.text() + ", wanted " +
                               wanted.text());
    }
    settle(tensor, view, order, dtype, kept);
    return view;
  }

  // Returns the tensor if it lies as the core takes it and is of this dtype, or else a copy that
  // is.
  py::object settle(py::handle tensor, View& view, Order order, Dtype dtype, Kept& kept) const {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    const auto negated = py::reinterpret_steal<py::object>(
        PyObject_CallMethodNoArgs(tensor.ptr(), is_neg));  // whose signs are only to be read so
    if (!negated) throw py::error_already_set();
    const View before = view;
    const auto is_settled = [&] {
      return view.dtype == dtype && view.is_dense(order == whole ? view.axes : 1);
    };
    auto copy = py::reinterpret_borrow<py::object>(tensor);
    if (negated.ptr() != Py_True && is_settled()) return copy;
    if (negated.ptr() == Py_True) copy = tensor.attr("resolve_neg")();
    copy = cast(std::move(copy), before.dtype, dtype);
    if (!tensors_.read(copy, view) || !is_settled()) copy = copy.attr("contiguous")();
    if (!tensors_.read(copy, view) || view.axes != before.axes || !is_settled() ||
        !std::equal(view.shape, view.shape + view.axes, before.shape)) {
      throw std::runtime_error("a tensor has no dense copy");
    }
    kept.push_back(copy);
    return copy;
  }

  // The same values in another dtype, rounded to nearest.
  py::object cast(py::object tensor, Dtype from, Dtype to) const {
    if (from == to) return tensor;
    View wide, narrow;
    if (to == Dtype::bfloat16 && tensors_.read(tensor, wide) && wide.dtype == Dtype::float32 &&
        wide.is_dense(wide.axes)) {
      py::object rounded = tensors_.empty(to, wide, narrow);
      Index n = 1;
      for (int i = 0; i < wide.axes; ++i) n *= wide.shape[i];
      to_bfloat16(wide.at<const float>(), n, narrow.at<Bfloat16>());
      return rounded;
    }
    return tensor.attr(to == Dtype::bfloat16 ? "bfloat16" : "float")();
  }

  template <class S>
  Sequence<S> sequence(const Inputs& in, const View& view) const {
    if (!view) return {};
    if (in.packed) return {view.at<S>(), 0, view.strides[0]};
    return {view.at<S>(), view.strides[batch_first_ ? 1 : 0], view.strides[batch_first_ ? 0 : 1]};
  }

  template <class E, class F>
  void in_session(const Inputs& in, int threads, F&& work) const {
    const std::vector<Weights<const E>> own = layers<const E>(in.weights);
    without_gil([&](Interrupt interrupt) {
      const ThreadLimit limit(threads);
      Session<E> session(in.shape, own.data(), in.batch());
      work(session, interrupt);
    });
  }

  template <class S>
  std::vector<Weights<S>> layers(const std::vector<View>& weights) const {
    std::vector<Weights<S>> found(weights.size() / members_.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
      found[i / members_.size()].*weight_member<S>[members_[i % members_.size()]] =
          weights[i].at<S>();
    }
    return found;
  }

  Tensors tensors_;
  Cell cell_;
  bool bias_;
  bool batch_first_;
  Index directions_;
  bool projected_;
  Dtype autocast_ = Dtype::other;  // none
  std::vector<int> members_;       // what a layer and direction has, of weight_member
};

}  // namespace

void bind_tensors(py::module_& m) {
  py::class_<Verbs>(m, "Verbs")
      .def(py::init<const py::type&, const py::type&, const std::string&, bool, bool, Index, bool,
                    const std::string&>(),
           py::arg("tensor"), py::arg("parameter"), py::arg("cell"), py::arg("bias"),
           py::arg("batch_first"), py::arg("directions"), py::arg("projected"), py::arg("autocast"))
      .def("problem", &Verbs::problem, py::arg("x"), py::arg("h"), py::arg("c"), py::arg("weights"),
           py::arg("batch_sizes"))
      .def("can_read", &Verbs::can_read, py::arg("gradients"))
      .def("tape_size", &Verbs::tape_size, py::arg("T"), py::arg("B"), py::arg("input_size"),
           py::arg("hidden_size"), py::arg("num_layers"), py::arg("proj_size"))
      .def("forward", &Verbs::forward, py::arg("x"), py::arg("h"), py::arg("c"), py::arg("weights"),
           py::arg("batch_sizes"), py::arg("keep"), py::arg("threads"))
      .def("backward", &Verbs::backward, py::arg("x"), py::arg("h"), py::arg("c"),
           py::arg("weights"), py::arg("batch_sizes"), py::arg("y"), py::arg("tape"),
           py::arg("grad_y"), py::arg("grad_h"), py::arg("grad_c"), py::arg("needed"),
           py::arg("threads"));
}

}  // namespace fastbptt::bindings
