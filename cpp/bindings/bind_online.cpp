// Streams that learn while they run: the learner of the recurrent layers, with the embedding before
// it and the readout and the loss behind it, so that a step is one call.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "arrays.h"
#include "cells.h"
#include "concepts.h"
#include "fastbptt/buffer.h"
#include "fastbptt/online.h"
#include "fastbptt/readout.h"

namespace fastbptt::bindings {
namespace {

Rule rule_of(const std::string& name) {
  if (name == "Truncated") return Rule::truncated;
  if (name == "RTRL") return Rule::rtrl;
  if (name == "SnAp1") return Rule::snap1;
  if (name == "EProp") return Rule::eprop;
  if (name == "UORO") return Rule::uoro;
  throw py::value_error("rule: got '" + name + "', wanted Truncated, RTRL, SnAp1, EProp or UORO");
}

std::string place(Index n, std::initializer_list<Index> index) {
  std::string text = "[";
  for (auto i = n == 1 ? index.begin() + 1 : index.begin(); i != index.end(); ++i) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(*i);
  }
  return text + "]";
}

// Some steps as the caller gave them, all of them checked: arrays with time first, [n, B, .].
struct Block {
  Index n = 0;
  py::array x;            // none: no input
  py::array x_mask;       // bytes; none: every row has input
  py::array target;       // none: no target
  py::array target_mask;  // bytes; none: every row has a target
  bool has_x = false, has_x_mask = false, has_target = false, has_target_mask = false;
  py::array prediction;
  std::int64_t ignore_index = 0;

  bool present(Index row) const {
    return has_x && (!has_x_mask || data<std::uint8_t>(x_mask)[row]);
  }
  bool counts(Index row) const {
    return has_target && (!has_target_mask || data<std::uint8_t>(target_mask)[row]);
  }
};

// Products of a readout from which the kernels are worth their preparation.
constexpr Index large_readout = Index(1) << 15;

class Stream {
 public:
  virtual ~Stream() = default;
  virtual Block open(Index n, const py::object& x, const py::object& x_mask,
                     const py::object& target, const py::object& target_mask,
                     std::int64_t ignore_index) const = 0;
  virtual py::tuple push(Block& block, Index begin, Index end) = 0;
  virtual py::array attempt(Block& block, Index t) = 0;
  virtual void keep(const py::object& grad) = 0;
  virtual void gather(const py::list& grads) = 0;
  virtual void reset(const py::array& rows) = 0;
  virtual py::dict state() = 0;
  // Of a stream that is not used if this throws.
  virtual void set_state(const py::dict& state) = 0;
};

template <class S>
class StreamOf : public Stream {
 public:
  // weights: of the layers; readout: weight and bias, or none.
  StreamOf(const StackShape& stack, Index B, const OnlineOptions& options, Loss loss,
           const py::list& weights, const py::object& embedding, const py::object& readout,
           const py::object& readout_bias)
      : stack_(stack), B_(B), loss_(loss), weights_(weights) {
    const Index H = stack.hidden_size, I = stack.input_size;
    std::vector<Weights<const S>> layers(stack.num_layers);
    for (Index l = 0; l < stack.num_layers; ++l) {
      const Index rows = gates(stack.cell) * H;
      const Index columns = stack.layer(l).input_size;
      const py::list all = weights;
      layers[l] = {own(all[4 * l], {rows, columns}), own(all[4 * l + 1], {rows, H}),
                   own(all[4 * l + 2], {rows}), own(all[4 * l + 3], {rows})};
    }
    if (!embedding.is_none()) {
      embedding_ = own(embedding, {-1, I});
      V_ = kept_.back().shape(0);
    }
    if (!readout.is_none()) {
      readout_ = own(readout, {-1, H});
      N_ = kept_.back().shape(0);
      readout_bias_ = own(readout_bias, {N_});
      readout_grad_ = zeroed(N_ * H);
      if (readout_bias_) bias_grad_ = zeroed(N_);
    } else {
      N_ = H;
    }
    // In floating point first, where it cannot overflow.
    if (double(B) * (double(I) + H + N_) > 1e17) throw std::bad_alloc();
    x_ = zeroed(B * I);
    y_ = zeroed(B * H);
    grad_y_ = zeroed(B * H);
    grad_prediction_ = zeroed(B * N_);
    present_.assign(B, 1);
    classes_.assign(B, 0);
    learner_ = new_online_learner<S>({stack, B, V_}, layers.data(), options);
  }

  Block open(Index n, const py::object& x, const py::object& x_mask, const py::object& target,
             const py::object& target_mask, std::int64_t ignore_index) const override {
    Block block;
    block.n = n;
    block.ignore_index = ignore_index;
    block.has_x_mask = take_mask("x_mask", x_mask, n, block.x_mask);
    block.has_target_mask = take_mask("target_mask", target_mask, n, block.target_mask);
    if (!x.is_none()) {
      block.has_x = true;
      if (V_) {
        block.x = own_copy(checked<std::int64_t>("x", x, {n, B_}));
        check_classes("x", block, data<std::int64_t>(block.x), V_, nullptr,
                      [&](Index row) { return block.present(row); });
      } else {
        block.x = contiguous(checked<S>("x", x, {n, B_, stack_.input_size}));
        check_finite("x", block, block.x, stack_.input_size,
                     [&](Index row) { return block.present(row); });
      }
    }
    if (!target.is_none()) {
      block.has_target = true;
      const auto counts = [&](Index row) { return block.counts(row); };
      if (loss_ == Loss::cross_entropy) {
        block.target = own_copy(checked<std::int64_t>("target", target, {n, B_}));
        check_classes("target", block, data<std::int64_t>(block.target), N_, &ignore_index, counts);
      } else {
        block.target = contiguous(checked<S>("target", target, {n, B_, N_}));
        check_finite("target", block, block.target, N_, counts);
      }
    }
    block.prediction = py::array(py::dtype::of<S>(), std::vector<Index>{n, B_, N_});
    return block;
  }

  // Returns the sum of the losses of what counts, how many numbers or classes do, the steps that
  // were taken, and the exception that ended them early, or None.
  py::tuple push(Block& block, Index begin, Index end) override {
    if (begin < 0 || begin > end || end > block.n) throw py::value_error("push: no such steps");
    double sum = 0;
    Index count = 0, t = begin;
    S* const predictions = static_cast<S*>(block.prediction.mutable_data());
    py::object ended = py::none();
    try {
      without_gil([&](Interrupt interrupt) {
        while (t < end) {
          S* const prediction = predictions + t * B_ * N_;
          run(block, t, prediction);
          const Index counted = take_loss(block, t, prediction, sum);
          learn(counted > 0);
          count += counted;
          ++t;
          if (t < end && interrupt.poll(interrupt.data)) throw Interrupted();
        }
      });
    } catch (py::error_already_set& error) {
      ended = error.value();
    } catch (const std::bad_alloc&) {
      ended = py::reinterpret_borrow<py::object>(PyExc_MemoryError)();
    }
    return py::make_tuple(sum, count, t - begin, ended);
  }

  py::array attempt(Block& block, Index t) override {
    S* const predictions = static_cast<S*>(block.prediction.mutable_data());
    run(block, t, predictions + t * B_ * N_);
    return block.prediction;
  }

  void keep(const py::object& grad) override {
    if (!grad.is_none()) {
      const py::array array = contiguous(checked<S>("grad_output of loss", grad, {1, B_, N_}));
      const S* const values = data<S>(array);
      const S* const wrong =
          std::find_if_not(values, values + B_ * N_, [](S value) { return std::isfinite(value); });
      if (wrong != values + B_ * N_) {
        throw py::value_error("grad_output of loss: got " + std::to_string(*wrong) +
                              ", wanted finite numbers");
      }
      std::copy_n(values, B_ * N_, grad_prediction_.data());
    }
    learn(!grad.is_none());
  }

  // Adds to the arrays in the order of the parameters: embedding, layers, readout.
  void gather(const py::list& grads) override {
    std::size_t next = 0;
    const auto take = [&] {
      return mutable_data<S>("grads", py::reinterpret_borrow<py::array>(grads[next++]));
    };
    S* const embedding = V_ ? take() : nullptr;
    std::vector<Weights<S>> layers(stack_.num_layers);
    for (Index l = 0; l < stack_.num_layers; ++l) {
      layers[l].w_ih = take();
      layers[l].w_hh = take();
      if (py::object(weights_[4 * l + 2]).is_none()) continue;
      layers[l].b_ih = take();
      layers[l].b_hh = take();
    }
    const auto add = [](Buffer<S>& from, S* to) {
      for (Index k = 0; k < from.size(); ++k) to[k] += from.data()[k];
      std::fill_n(from.data(), from.size(), S(0));
    };
    S* const weight = readout_ ? take() : nullptr;
    S* const bias = readout_bias_ ? take() : nullptr;
    const WithoutGil free;
    // First what memory may be too little for.
    learner_->gather(layers.data(), embedding);
    if (weight) add(readout_grad_, weight);
    if (bias) add(bias_grad_, bias);
  }

  void reset(const py::array& rows) override {
    learner_->reset(data<std::uint8_t>(contiguous(checked_bytes("rows", rows, {B_}))));
  }

  py::dict state() override {
    py::dict all;
    for (const OnlineField& field : fields()) {
      const auto [dtype, size] = type_of(field.kind);
      py::array array(dtype, std::vector<Index>{field.size});
      if (field.size) std::memcpy(array.mutable_data(), field.data, field.size * size);
      all[field.name] = array;
    }
    return all;
  }

  void set_state(const py::dict& state) override {
    std::vector<std::pair<OnlineField, py::array>> found;
    for (const OnlineField& field : fields()) {
      const std::string name = std::string("state['stream']['") + field.name + "']";
      if (!state.contains(field.name)) throw py::value_error(name + ": missing");
      const py::object value = state[field.name];
      if (!py::isinstance<py::array>(value)) {
        throw py::type_error(name + ": wanted a NumPy array");
      }
      const py::array array = contiguous(py::reinterpret_borrow<py::array>(value));
      const py::dtype dtype = type_of(field.kind).first;
      if (!array.dtype().equal(dtype) || array.ndim() != 1 || array.shape(0) != field.size) {
        throw py::value_error(name + ": got " + text_of(array.dtype()) + " of shape " +
                              shape_text(shape_of(array)) + ", wanted " + text_of(dtype) +
                              " of shape " + shape_text({field.size}));
      }
      found.emplace_back(field, array);
    }
    for (const auto& [field, array] : found) {
      if (field.size)
        std::memcpy(field.data, array.data(), field.size * type_of(field.kind).second);
    }
    if (const char* const name = learner_->damaged()) {
      throw py::value_error(std::string("state['stream']['") + name +
                            "']: got numbers that no stream of this kind has");
    }
  }

 private:
  static Buffer<S> zeroed(Index n) {
    Buffer<S> buffer(n);
    std::fill_n(buffer.data(), n, S(0));
    return buffer;
  }

  static std::pair<py::dtype, std::size_t> type_of(OnlineField::Kind kind) {
    switch (kind) {
      case OnlineField::Kind::scalar:
        return {py::dtype::of<S>(), sizeof(S)};
      case OnlineField::Kind::real:
        return {py::dtype::of<double>(), sizeof(double)};
      case OnlineField::Kind::integer:
        return {py::dtype::of<std::int64_t>(), sizeof(std::int64_t)};
      default:
        return {py::dtype::of<std::uint8_t>(), 1};
    }
  }

  const S* own(const py::handle& array, std::initializer_list<Index> shape) {
    if (array.is_none()) return nullptr;
    kept_.push_back(checked<S>("weights", array, shape));
    return mutable_data<S>("weights", kept_.back());
  }

  static py::array checked_bytes(const char* name, const py::object& object,
                                 const std::vector<Index>& shape) {
    const py::array array = py::reinterpret_borrow<py::array>(object);
    if (!py::isinstance<py::array_t<std::uint8_t>>(array) || shape_of(array) != shape) {
      throw py::value_error(std::string(name) + ": got shape " + shape_text(shape_of(array)) +
                            ", wanted " + shape_text(shape));
    }
    return array;
  }

  bool take_mask(const char* name, const py::object& mask, Index n, py::array& to) const {
    if (mask.is_none()) return false;
    to = contiguous(checked_bytes(name, mask, {n, B_}));
    return true;
  }

  template <class F>
  void check_finite(const char* name, const Block& block, const py::array& array, Index K,
                    F&& counts) const {
    const S* values = data<S>(array);
    for (Index row = 0; row < block.n * B_; ++row, values += K) {
      if (!counts(row)) continue;
      // Zero times a value is NaN where the value is no finite number.
      S sum = 0;
      for (Index k = 0; k < K; ++k) sum += values[k] * S(0);
      if (sum == 0) continue;
      Index k = 0;
      while (std::isfinite(values[k])) ++k;
      throw py::value_error(std::string(name) + ": got " + std::to_string(values[k]) + " at " +
                            place(block.n, {row / B_, row % B_, k}) + ", wanted finite numbers");
    }
  }

  template <class F>
  void check_classes(const char* name, const Block& block, const std::int64_t* classes, Index most,
                     const std::int64_t* ignore, F&& counts) const {
    for (Index row = 0; row < block.n * B_; ++row) {
      const std::int64_t k = classes[row];
      if ((k >= 0 && k < most) || !counts(row) || (ignore && k == *ignore)) continue;
      throw py::value_error(std::string(name) + ": got class " + std::to_string(k) + " at " +
                            place(block.n, {row / B_, row % B_}) + ", wanted from 0 to " +
                            std::to_string(most - 1) +
                            (ignore ? ", or ignore_index = " + std::to_string(*ignore) : ""));
    }
  }

  void run(const Block& block, Index t, S* prediction) {
    const Index I = stack_.input_size;
    for (Index b = 0; b < B_; ++b) {
      const Index row = t * B_ + b;
      present_[b] = block.present(row);
      S* const to = x_.data() + b * I;
      classes_[b] = V_ && present_[b] ? data<std::int64_t>(block.x)[row] : 0;
      if (!present_[b])
        std::fill_n(to, I, S(0));
      else
        std::copy_n(V_ ? embedding_ + classes_[b] * I : data<S>(block.x) + row * I, I, to);
    }
    learner_->attempt(x_.data(), V_ ? classes_.data() : nullptr, present_.data(), y_.data());
    if (readout_)
      linear(readout(), prediction, false);
    else
      std::copy_n(y_.data(), B_ * N_, prediction);
  }

  // dL/d(prediction) of the sum of the losses.
  Index take_loss(const Block& block, Index t, const S* prediction, double& sum) {
    Index count = 0;
    for (Index b = 0; b < B_; ++b) {
      const Index row = t * B_ + b;
      const S* const p = prediction + b * N_;
      S* const grad = grad_prediction_.data() + b * N_;
      std::fill_n(grad, N_, S(0));
      if (!block.counts(row)) continue;
      if (loss_ == Loss::mse) {
        const S* const target = data<S>(block.target) + row * N_;
        for (Index k = 0; k < N_; ++k) {
          const S difference = p[k] - target[k];
          sum += double(difference) * double(difference);
          grad[k] = 2 * difference;
        }
        count += N_;
      } else {
        const std::int64_t target = data<std::int64_t>(block.target)[row];
        if (target == block.ignore_index) continue;
        const S largest = *std::max_element(p, p + N_);
        S total = 0;
        for (Index k = 0; k < N_; ++k) total += grad[k] = std::exp(p[k] - largest);
        for (Index k = 0; k < N_; ++k) grad[k] /= total;
        grad[target] -= 1;
        sum += std::log(double(total)) + double(largest) - double(p[target]);
        ++count;
      }
    }
    return count;
  }

  void learn(bool with_error) {
    if (!with_error) return learner_->keep(nullptr);
    if (!readout_) return learner_->keep(grad_prediction_.data());
    const Index H = stack_.hidden_size;
    if (B_ * N_ * H >= large_readout) {
      linear_backward(readout(), grad_prediction_.data(), grad_y_.data(), readout_grad_.data(),
                      bias_grad_.data());
      return learner_->keep(grad_y_.data());
    }
    std::fill_n(grad_y_.data(), B_ * H, S(0));
    for (Index b = 0; b < B_; ++b) {
      const S* const y = y_.data() + b * H;
      S* const grad_y = grad_y_.data() + b * H;
      for (Index n = 0; n < N_; ++n) {
        const S grad = grad_prediction_.data()[b * N_ + n];
        if (grad == 0) continue;
        const S* const weight = readout_ + n * H;
        S* const to = readout_grad_.data() + n * H;
        for (Index k = 0; k < H; ++k) {
          grad_y[k] += grad * weight[k];
          to[k] += grad * y[k];
        }
        if (readout_bias_) bias_grad_.data()[n] += grad;
      }
    }
    learner_->keep(grad_y_.data());
  }

  Linear<S> readout() const {
    return {B_, stack_.hidden_size, N_, y_.data(), readout_, readout_bias_};
  }

  std::vector<OnlineField> fields() {
    std::vector<OnlineField> all = learner_->fields();
    const auto add = [&](const char* name, const Buffer<S>& buffer) {
      if (buffer.size()) {
        all.push_back({name, OnlineField::Kind::scalar, buffer.data(), buffer.size()});
      }
    };
    add("gathered_readout", readout_grad_);
    add("gathered_readout_bias", bias_grad_);
    return all;
  }

  StackShape stack_;
  Index B_;
  Index V_ = 0;  // classes of the embedding, or 0
  Index N_ = 0;
  Loss loss_;
  py::list weights_;
  std::vector<py::array> kept_;
  const S* embedding_ = nullptr;
  const S* readout_ = nullptr;
  const S* readout_bias_ = nullptr;
  Buffer<S> readout_grad_, bias_grad_;
  Buffer<S> x_, y_, grad_y_, grad_prediction_;
  std::vector<std::uint8_t> present_;
  std::vector<std::int64_t> classes_;
  std::unique_ptr<OnlineLearner<S>> learner_;
};

std::unique_ptr<Stream> new_stream(const std::string& cell, Index input_size, Index hidden_size,
                                   Index num_layers, const std::string& dtype, Index B,
                                   const std::string& rule, Index k1, Index k2, std::uint64_t seed,
                                   const std::string& loss, const py::list& weights,
                                   const py::object& embedding, const py::object& readout,
                                   const py::object& readout_bias) {
  const StackShape stack{cell_of(cell), input_size, hidden_size, num_layers};
  const OnlineOptions options{rule_of(rule), k1, k2, seed};
  const Loss kind = loss == "cross_entropy" ? Loss::cross_entropy : Loss::mse;
  if (dtype == "float64") {
    return std::make_unique<StreamOf<double>>(stack, B, options, kind, weights, embedding, readout,
                                              readout_bias);
  }
  return std::make_unique<StreamOf<float>>(stack, B, options, kind, weights, embedding, readout,
                                           readout_bias);
}

}  // namespace

void bind_online(py::module_& m) {
  py::class_<Block>(m, "Block").def_readonly("prediction", &Block::prediction);
  py::class_<Stream>(m, "Stream")
      .def(py::init(&new_stream), py::arg("cell"), py::arg("input_size"), py::arg("hidden_size"),
           py::arg("num_layers"), py::arg("dtype"), py::arg("B"), py::arg("rule"), py::arg("k1"),
           py::arg("k2"), py::arg("seed"), py::arg("loss"), py::arg("weights"),
           py::arg("embedding"), py::arg("readout"), py::arg("readout_bias"))
      .def("open", &Stream::open, py::arg("n"), py::arg("x"), py::arg("x_mask"), py::arg("target"),
           py::arg("target_mask"), py::arg("ignore_index"))
      .def("push", &Stream::push, py::arg("block"), py::arg("begin"), py::arg("end"))
      .def("attempt", &Stream::attempt, py::arg("block"), py::arg("t"))
      .def("keep", &Stream::keep, py::arg("grad"))
      .def("gather", &Stream::gather, py::arg("grads"))
      .def("reset", &Stream::reset, py::arg("rows"))
      .def("state", &Stream::state)
      .def("set_state", &Stream::set_state, py::arg("state"));
}

}  // namespace fastbptt::bindings
