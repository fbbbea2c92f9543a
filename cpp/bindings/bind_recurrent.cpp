#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "arrays.h"
#include "cells.h"
#include "concepts.h"
#include "fastbptt/buffer.h"

namespace fastbptt::bindings {
namespace {

// A state as the caller gave it: arrays that live as long as this does, and pointers into them.
template <class S>
struct StateArrays {
  py::array h;
  py::array c;
  State<const S> view;
};

// h of a bfloat16 layer in float32, and such values back. c is float32 for the caller too: it is
// not rounded from step to step, so neither may it be where time is cut.
py::array widened_copy(const py::array& narrow) {
  py::array wide = new_array<float>(shape_of(narrow));
  const Bfloat16* const from = data<Bfloat16>(narrow);
  auto* const to = static_cast<float*>(wide.mutable_data());
  for (Index i = 0; i < wide.size(); ++i) to[i] = widened(from[i]);
  return wide;
}
py::array narrowed_copy(const py::array& wide) {
  py::array narrow = new_array<Bfloat16>(shape_of(wide));
  const float* const from = data<float>(wide);
  auto* const to = static_cast<Bfloat16*>(narrow.mutable_data());
  for (Index i = 0; i < wide.size(); ++i) to[i] = narrowed(from[i]);
  return narrow;
}

// A state for results.
template <class S>
struct NewState {
  py::array h;
  py::array c;
  State<S> view;
  bool has_c = false;

  // What the caller gets for it.
  template <class E>
  py::object as() {
    py::array own = std::is_same_v<E, S> ? std::move(h) : narrowed_copy(h);
    if (!has_c) return std::move(own);
    return py::make_tuple(std::move(own), std::move(c));
  }
};

// What is known of a batch beside its input, as the caller gave it.
struct BatchOptions {
  std::optional<std::vector<Index>> lengths;
  std::optional<std::uint64_t> seed;
  std::optional<py::array> resets;  // [T, B]
  std::optional<py::array> mask;
  bool cells = false;  // whether every c is an output too

  // From a dict of what there is, or None.
  BatchOptions(const py::object& given, Index T, Index B) {
    if (given.is_none()) return;
    for (const auto& [key, value] : given.cast<py::dict>()) {
      const std::string name = py::str(key);
      if (name == "lengths")
        lengths = checked_lengths(value, T, B);
      else if (name == "seed")
        seed = value.cast<std::uint64_t>();
      else if (name == "resets")
        resets = own_copy(checked<bool>("resets", value, {T, B}));
      else if (name == "mask")
        mask = own_copy(checked<bool>("mask", value, {T, B}));
      else if (name == "cells")
        cells = value.cast<bool>();
      else
        throw py::type_error("batch: got '" + name +
                             "', wanted lengths, seed, resets, mask or cells");
    }
  }
  BatchOptions() = default;

  Batch view(Index T, Index B, Index begin) const {
    const auto flags = [&](const std::optional<py::array>& array) {
      return array ? data<bool>(*array) + begin * B : nullptr;
    };
    return {T,
            B,
            lengths ? lengths->data() : nullptr,
            false,
            seed ? &*seed : nullptr,
            begin,
            flags(resets),
            flags(mask)};
  }

 private:
  static std::vector<Index> checked_lengths(const py::handle& value, Index T, Index B) {
    const py::array array = contiguous(checked<Index>("lengths", value, {B}));
    const std::vector<Index> all(data<Index>(array), data<Index>(array) + B);
    for (const Index length : all) {
      if (length < 0 || length > T) {
        throw py::value_error("lengths: got " + std::to_string(length) + ", wanted from 0 to " +
                              std::to_string(T));
      }
    }
    return all;
  }
};

// What one record kept, and all that its reverse needs again.
struct TapeData {
  std::uint64_t stack = 0;  // Stack::id
  Index T = 0;
  Index B = 0;
  Index begin = 0;  // the step of the sequence before which it begins
  BatchOptions batch;
  std::atomic<bool> consumed{false};
  virtual Index nbytes() const = 0;
  virtual void clear() = 0;
  virtual ~TapeData() = default;
};

template <class E>
struct TapeOf : TapeData {
  using S = Arithmetic<E>;
  Buffer<S> steps;
  SequenceArray<E> x;
  py::array y;
  Sequence<const E> y_view;
  StateArrays<S> initial;
  Index nbytes() const override { return steps.size() * Index(sizeof(S)); }
  void clear() override {
    steps = Buffer<S>();
    x = SequenceArray<E>();
    y = py::array();
    initial = StateArrays<S>();
  }
};

class Tape {
 public:
  explicit Tape(std::unique_ptr<TapeData> data) : data_(std::move(data)) {}
  TapeData& get() const { return *data_; }

 private:
  std::unique_ptr<TapeData> data_;
};

class Session;

class Stack {
  enum class Dtype { f32, f64, bf16 };

  // Calls work with a value of the type of parameters, x and y.
  template <class F>
  auto by_type(F&& work) const {
    if (dtype_ == Dtype::f64) return work(double{});
    if (dtype_ == Dtype::bf16) return work(Bfloat16{});
    return work(float{});
  }

 public:
  Stack(const std::string& cell, Index input_size, Index hidden_size, Index num_layers,
        bool batch_first, const std::string& dtype, const py::list& weights,
        const py::dict& options)
      : shape_{cell_of(cell), input_size, hidden_size, num_layers}, batch_first_(batch_first) {
    take(options);
    if (dtype != "float32" && dtype != "float64" && dtype != "bfloat16") {
      throw py::value_error("dtype: got '" + dtype +
                            "', wanted 'float32', 'float64' or 'bfloat16'");
    }
    dtype_ = dtype == "float64" ? Dtype::f64 : dtype == "float32" ? Dtype::f32 : Dtype::bf16;
    if (dtype_ == Dtype::f64 && shape_.options.narrow_tape) {
      throw py::value_error("narrow_tape: got true for float64, wanted float32 or bfloat16");
    }
    for (const auto& [name, size] : {std::pair<const char*, Index>{"input_size", input_size},
                                     {"hidden_size", hidden_size},
                                     {"num_layers", num_layers}}) {
      if (size < 1) {
        throw py::value_error(std::string(name) + ": got " + std::to_string(size) +
                              ", wanted at least 1");
      }
    }
    check_projection(shape_);
    const Index wanted = weights_a_layer * shape_.layers();
    if (static_cast<Index>(weights.size()) != wanted) {
      throw py::value_error("weights: got " + std::to_string(weights.size()) + " arrays, wanted " +
                            std::to_string(wanted));
    }
    by_type([&](auto type) { keep<decltype(type)>(weights); });
  }

  // For parts of at most `longest` steps of a sequence of T steps of B rows.
  std::unique_ptr<Session> new_session(Index T, Index B, Index longest, const py::object& batch,
                                       Index begin) const;

  // Of the tape of T steps of B rows as long as each other.
  Index tape_nbytes(Index T, Index B) const {
    return by_type([&](auto type) {
      using E = decltype(type);
      return tape_size<E>(shape_, T, B) * Index(sizeof(Arithmetic<E>));
    });
  }

  // A whole sequence in one call.
  py::tuple advance(const py::object& x, const py::object& state, const py::object& batch) const {
    return by_type([&](auto type) { return whole_advance<decltype(type)>(x, state, batch); });
  }
  py::tuple record(const py::object& x, const py::object& state, const py::object& batch) const {
    return by_type([&](auto type) { return whole_record<decltype(type)>(x, state, batch); });
  }
  py::tuple reverse(const Tape& tape, const py::object& grad_y, const py::object& grad_state,
                    bool need_x, const py::object& grad_cells) const {
    return by_type([&](auto type) {
      return whole_reverse<decltype(type)>(tape, grad_y, grad_state, need_x, grad_cells);
    });
  }

 private:
  template <class>
  friend class SessionOf;

  // What a stack may have beside cell, sizes and layers.
  void take(const py::dict& options) {
    for (const auto& [key, value] : options) {
      const std::string name = py::str(key);
      if (name == "bidirectional")
        shape_.directions = value.cast<bool>() ? 2 : 1;
      else if (name == "dropout")
        shape_.dropout = value.cast<double>();
      else if (name == "peephole")
        shape_.options.peephole = value.cast<bool>();
      else if (name == "layer_norm")
        shape_.options.layer_norm = value.cast<bool>();
      else if (name == "recurrent_dropout")
        shape_.options.recurrent_dropout = value.cast<double>();
      else if (name == "zoneout_h")
        shape_.options.zoneout_h = value.cast<double>();
      else if (name == "zoneout_c")
        shape_.options.zoneout_c = value.cast<double>();
      else if (name == "proj_size")
        shape_.proj_size = value.cast<Index>();
      else if (name == "narrow_tape")
        shape_.options.narrow_tape = value.cast<bool>();
      else if (name == "precision" && !value.is_none())
        shape_.precision = precision_of(value.cast<std::string>());
      else if (name != "precision")
        throw py::type_error("options: got '" + name +
                             "', wanted bidirectional, dropout, peephole, layer_norm, "
                             "recurrent_dropout, zoneout_h, zoneout_c, proj_size, narrow_tape "
                             "or precision");
    }
  }

  template <class E>
  void keep(const py::list& weights) {
    for (Index i = 0; i < static_cast<Index>(weights.size()); ++i) {
      const int which = static_cast<int>(i % weights_a_layer);
      const py::object weight = weights[i];
      const WeightShape wanted = weight_shape(shape_.layer(i / weights_a_layer), which);
      if (wanted.rows == 0 || (wanted.columns == 0 && weight.is_none())) {
        weights_.emplace_back();
        continue;
      }
      weights_.push_back(wanted.columns > 0
                             ? checked<E>("weights", weight, {wanted.rows, wanted.columns})
                             : checked<E>("weights", weight, {wanted.rows}));
      mutable_data<E>("weights", *weights_.back());
    }
  }

  // The parameters as they are now; NumPy lets nobody move them while they are referred to here.
  template <class E>
  std::vector<Weights<const E>> weights() const {
    std::vector<Weights<const E>> layers(shape_.layers());
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      if (weights_[i]) {
        layers[i / weights_a_layer].*weight_member<const E>[i % weights_a_layer] =
            data<E>(*weights_[i]);
      }
    }
    return layers;
  }

  // h of type E.
  template <class E>
  StateArrays<Arithmetic<E>> checked_state(const char* name, const py::object& state,
                                           Index B) const {
    using S = Arithmetic<E>;
    StateArrays<S> result;
    if (state.is_none()) return result;
    const Index K = shape_.layers(), H = shape_.hidden_size, R = shape_.output_size();
    const auto h_of = [&](const std::string& part_name, const py::handle& array) {
      const py::array h = contiguous(checked<E>(part_name.c_str(), array, {K, B, R}));
      return std::is_same_v<E, S> ? h : widened_copy(h);
    };
    if (has_cell_state(shape_.cell)) {
      const bool pair = (py::isinstance<py::tuple>(state) || py::isinstance<py::list>(state)) &&
                        py::len(state) == 2;
      if (!pair) {
        throw py::type_error(
            std::string(name) + ": got " + text_of(py::type::of(state).attr("__name__")) +
            ", wanted a tuple (h, c) of two arrays of shape " +
            (R == H ? "" : shape_text({K, B, R}) + " and ") + shape_text({K, B, H}));
      }
      const auto items = py::reinterpret_borrow<py::sequence>(state);
      result.h = h_of(std::string(name) + "[0]", py::object(items[0]));
      result.c = contiguous(
          checked<S>((std::string(name) + "[1]").c_str(), py::object(items[1]), {K, B, H}));
      result.view = {data<S>(result.h), data<S>(result.c)};
    } else {
      result.h = h_of(name, state);
      result.view = {data<S>(result.h), nullptr};
    }
    return result;
  }

  template <class S>
  NewState<S> new_state(Index B) const {
    const Index K = shape_.layers();
    NewState<S> state;
    state.h = new_array<S>({K, B, shape_.output_size()});
    state.view.h = static_cast<S*>(state.h.mutable_data());
    state.has_c = has_cell_state(shape_.cell);
    if (!state.has_c) return state;
    state.c = new_array<S>({K, B, shape_.hidden_size});
    state.view.c = static_cast<S*>(state.c.mutable_data());
    return state;
  }

  // One forward run: the arguments checked, the results allocated.
  template <class E>
  struct Call {
    using S = Arithmetic<E>;
    Index B;
    SequenceArray<E> x;
    StateArrays<S> initial;
    py::array y;
    py::object cells;  // or None
    NewState<S> final;
    Forward<E> run;
    py::object output() const { return cells.is_none() ? py::object(y) : py::make_tuple(y, cells); }
  };

  template <class E>
  Call<E> prepare(const py::object& x, const py::object& state, bool batch_first) const {
    Call<E> call;
    call.cells = py::none();
    call.x = SequenceArray<E>(checked<E>("x", x, {-1, -1, shape_.input_size}), batch_first);
    const py::array& input = call.x.array();
    const Index T = input.shape(batch_first ? 1 : 0), B = input.shape(batch_first ? 0 : 1);
    call.B = B;
    if (B < 1) {
      throw py::value_error("x: got shape " + shape_text(shape_of(input)) +
                            ", wanted a batch of at least 1");
    }
    const Index F = y_width();
    call.initial = checked_state<E>("state", state, B);
    call.y = batch_first ? new_array<E>({B, T, F}) : new_array<E>({T, B, F});
    call.final = new_state<Arithmetic<E>>(B);
    const Sequence<E> y{static_cast<E*>(call.y.mutable_data()), batch_first ? F : B * F,
                        batch_first ? T * F : F};
    call.run = {T, call.x.view(), call.initial.view, y, call.final.view, 0, {}};
    return call;
  }

  // Every c of the last layer as an output, beside y.
  template <class E>
  void add_cells(Call<E>& call, bool batch_first) const {
    using S = Arithmetic<E>;
    const Index T = call.run.steps, B = call.B, F = shape_.directions * shape_.hidden_size;
    py::array cells = batch_first ? new_array<S>({B, T, F}) : new_array<S>({T, B, F});
    call.run.cells = {static_cast<S*>(cells.mutable_data()), batch_first ? F : B * F,
                      batch_first ? T * F : F};
    call.cells = std::move(cells);
  }

  Index y_width() const { return shape_.directions * shape_.output_size(); }

  template <class E>
  std::unique_ptr<fastbptt::Session<E>> session(const Batch& batch, Index longest) const {
    const std::vector<Weights<const E>> now = weights<E>();
    return std::make_unique<fastbptt::Session<E>>(shape_, now.data(), batch, longest);
  }

  template <class E>
  static py::tuple advance_in(fastbptt::Session<E>& session, Call<E> call) {
    without_gil([&](Interrupt interrupt) { session.advance(call.run, interrupt); });
    return py::make_tuple(call.output(), call.final.template as<E>());
  }

  template <class E>
  py::tuple record_in(fastbptt::Session<E>& session, Call<E> call,
                      const BatchOptions& batch) const {
    auto tape = std::make_unique<TapeOf<E>>();
    tape->steps = Buffer<Arithmetic<E>>(session.tape_size(call.run.begin, call.run.steps));
    without_gil(
        [&](Interrupt interrupt) { session.record(call.run, tape->steps.data(), interrupt); });
    tape->stack = id_;
    tape->T = call.run.steps;
    tape->B = call.B;
    tape->begin = call.run.begin;
    tape->batch = batch;
    tape->x = call.x;
    tape->y = call.y;
    tape->y_view = {call.run.y.data, call.run.y.step, call.run.y.row};
    tape->initial = call.initial;
    return py::make_tuple(call.output(), call.final.template as<E>(),
                          std::make_shared<Tape>(std::move(tape)));
  }

  template <class E>
  TapeOf<E>& own(const Tape& handle) const {
    TapeData& any = handle.get();
    if (any.stack != id_) {
      throw py::value_error(
          "tape: got a tape of another layer, wanted one that this layer recorded");
    }
    return static_cast<TapeOf<E>&>(any);
  }

  // The gradients of input and state, in that order.
  template <class E>
  std::pair<py::object, py::object> reverse_in(fastbptt::Session<E>& session, TapeOf<E>& tape,
                                               const py::object& grad_y,
                                               const py::object& grad_cells,
                                               const py::object& grad_state, bool need_x,
                                               bool batch_first) const {
    using S = Arithmetic<E>;
    const Index T = tape.T, B = tape.B, I = shape_.input_size;
    const Index first = batch_first ? B : T, second = batch_first ? T : B;

    SequenceArray<S> dy;
    if (!grad_y.is_none()) {
      dy = SequenceArray<S>(checked<S>("grad_y", grad_y, {first, second, y_width()}), batch_first);
    }
    SequenceArray<S> d_cells;
    if (!grad_cells.is_none()) {
      if (!has_cell_state(shape_.cell)) {
        throw py::value_error("grad_cells: got an array for a layer without cells, wanted None");
      }
      const Index F = shape_.directions * shape_.hidden_size;
      d_cells =
          SequenceArray<S>(checked<S>("grad_cells", grad_cells, {first, second, F}), batch_first);
    }
    const StateArrays<S> final = checked_state<S>("grad_state", grad_state, B);

    py::object grad_x = py::none();
    Sequence<S> dx;
    if (need_x) {
      py::array array = new_array<S>({first, second, I});
      dx = {static_cast<S*>(array.mutable_data()), batch_first ? I : B * I,
            batch_first ? T * I : I};
      grad_x = std::move(array);
    }
    NewState<S> initial = new_state<S>(B);

    if (tape.consumed.exchange(true)) {
      throw py::value_error(
          "tape: it has been used by an earlier backward; wanted a tape of a new forward");
    }
    try {
      // reverse writes neither y nor the final state of the run.
      const Forward<E> run{T,
                           tape.x.view(),
                           tape.initial.view,
                           {const_cast<E*>(tape.y_view.data), tape.y_view.step, tape.y_view.row},
                           {},
                           tape.begin,
                           {}};
      const Reverse<S> grad{tape.steps.data(), dy.view(), final.view,    dx,
                            initial.view,      nullptr,   d_cells.view()};
      without_gil([&](Interrupt interrupt) { session.reverse(run, grad, interrupt); });
    } catch (...) {
      tape.consumed = false;  // nothing of the tape was changed: it may be used again
      throw;
    }
    tape.clear();
    return {std::move(grad_x), initial.template as<S>()};
  }

  // The weight gradients that a session has gathered, as new arrays.
  template <class E>
  py::list weight_gradients(fastbptt::Session<E>& session) const {
    using S = Arithmetic<E>;
    py::list grads;
    std::vector<Weights<S>> to(shape_.layers());
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      if (!weights_[i]) {
        grads.append(py::none());
        continue;
      }
      py::array grad = new_array<S>(shape_of(*weights_[i]));
      to[i / weights_a_layer].*weight_member<S>[i % weights_a_layer] =
          static_cast<S*>(grad.mutable_data());
      grads.append(std::move(grad));
    }
    const WithoutGil free;
    session.finish(to.data());
    return grads;
  }

  template <class E>
  py::tuple whole_advance(const py::object& x, const py::object& state,
                          const py::object& batch) const {
    Call<E> call = prepare<E>(x, state, batch_first_);
    const BatchOptions options(batch, call.run.steps, call.B);
    if (options.cells) add_cells(call, batch_first_);
    const auto own_session = session<E>(options.view(call.run.steps, call.B, 0), call.run.steps);
    return advance_in<E>(*own_session, std::move(call));
  }
  template <class E>
  py::tuple whole_record(const py::object& x, const py::object& state,
                         const py::object& batch) const {
    Call<E> call = prepare<E>(x, state, batch_first_);
    const BatchOptions options(batch, call.run.steps, call.B);
    if (options.cells) add_cells(call, batch_first_);
    const auto own_session = session<E>(options.view(call.run.steps, call.B, 0), call.run.steps);
    return record_in<E>(*own_session, std::move(call), options);
  }
  template <class E>
  py::tuple whole_reverse(const Tape& handle, const py::object& grad_y,
                          const py::object& grad_state, bool need_x,
                          const py::object& grad_cells) const {
    TapeOf<E>& tape = own<E>(handle);
    const BatchOptions options = tape.batch;
    const auto own_session =
        session<E>(options.view(tape.begin + tape.T, tape.B, tape.begin), tape.T);
    auto [grad_x, grad_initial] =
        reverse_in<E>(*own_session, tape, grad_y, grad_cells, grad_state, need_x, batch_first_);
    return py::make_tuple(std::move(grad_x), std::move(grad_initial),
                          weight_gradients<E>(*own_session));
  }

  static std::uint64_t next_id() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
  }

  std::uint64_t id_ = next_id();
  StackShape shape_;
  bool batch_first_;
  Dtype dtype_ = Dtype::f32;
  std::vector<std::optional<py::array>> weights_;
};

// The verbs over parts of one sequence; time comes first, whatever the stack's own order.
class Session {
 public:
  virtual ~Session() = default;
  virtual py::tuple advance(const py::object& x, const py::object& state, Index begin) = 0;
  virtual py::tuple record(const py::object& x, const py::object& state, Index begin) = 0;
  virtual py::tuple reverse(const Tape& tape, const py::object& grad_y,
                            const py::object& grad_state, bool need_x) = 0;
  virtual py::list finish() = 0;
  virtual Index nbytes() const = 0;
};

template <class E>
class SessionOf : public Session {
 public:
  SessionOf(const Stack& stack, Index T, Index B, Index longest, const py::object& batch,
            Index begin)
      : stack_(stack),
        batch_(batch, T, B),
        T_(T),
        B_(B),
        longest_(longest),
        session_(stack.session<E>(batch_.view(T, B, begin), longest)) {}
  py::tuple advance(const py::object& x, const py::object& state, Index begin) override {
    return Stack::advance_in<E>(*session_, prepare(x, state, begin));
  }
  py::tuple record(const py::object& x, const py::object& state, Index begin) override {
    return stack_.record_in<E>(*session_, prepare(x, state, begin), batch_);
  }
  py::tuple reverse(const Tape& handle, const py::object& grad_y, const py::object& grad_state,
                    bool need_x) override {
    TapeOf<E>& tape = stack_.own<E>(handle);
    check(tape.T, tape.B, "tape");
    auto [x, state] =
        stack_.reverse_in<E>(*session_, tape, grad_y, py::none(), grad_state, need_x, false);
    return py::make_tuple(std::move(x), std::move(state));
  }
  py::list finish() override { return stack_.weight_gradients<E>(*session_); }
  Index nbytes() const override { return session_->nbytes(); }

 private:
  Stack::Call<E> prepare(const py::object& x, const py::object& state, Index begin) const {
    auto call = stack_.prepare<E>(x, state, false);
    check(call.run.steps, call.B, "x");
    const bool whole = begin == 0 && call.run.steps == T_;
    if (begin < 0 || begin + call.run.steps > T_ || (stack_.shape_.directions == 2 && !whole)) {
      throw py::value_error(
          "begin: got steps " + std::to_string(begin) + " to " +
          std::to_string(begin + call.run.steps) + " of " + std::to_string(T_) +
          (stack_.shape_.directions == 2 ? ", wanted all, in both directions" : ""));
    }
    call.run.begin = begin;
    return call;
  }
  void check(Index steps, Index B, const char* name) const {
    if (steps > longest_ || B != B_) {
      throw py::value_error(std::string(name) + ": got " + std::to_string(steps) + " steps of " +
                            std::to_string(B) + " rows in a session for at most " +
                            std::to_string(longest_) + " steps of " + std::to_string(B_));
    }
  }

  const Stack& stack_;  // kept alive by Python
  BatchOptions batch_;
  Index T_;
  Index B_;
  Index longest_;
  std::unique_ptr<fastbptt::Session<E>> session_;
};

std::unique_ptr<Session> Stack::new_session(Index T, Index B, Index longest,
                                            const py::object& batch, Index begin) const {
  for (const auto& [name, size] :
       {std::pair<const char*, Index>{"T", T}, {"B", B}, {"longest", longest}}) {
    if (size < 1) {
      throw py::value_error(std::string(name) + ": got " + std::to_string(size) +
                            ", wanted at least 1");
    }
  }
  return by_type([&](auto type) -> std::unique_ptr<Session> {
    return std::make_unique<SessionOf<decltype(type)>>(*this, T, B, longest, batch, begin);
  });
}

}  // namespace

void bind_recurrent(py::module_& m) {
  py::class_<Tape, std::shared_ptr<Tape>>(m, "Tape")
      .def_property_readonly("nbytes", [](const Tape& tape) { return tape.get().nbytes(); })
      .def_property_readonly("consumed",
                             [](const Tape& tape) { return tape.get().consumed.load(); });
  py::class_<Session>(m, "Session")
      .def("advance", &Session::advance, py::arg("x"), py::arg("state"), py::arg("begin"))
      .def("record", &Session::record, py::arg("x"), py::arg("state"), py::arg("begin"))
      .def("reverse", &Session::reverse, py::arg("tape"), py::arg("grad_y"), py::arg("grad_state"),
           py::arg("need_x"))
      .def("finish", &Session::finish)
      .def_property_readonly("nbytes", &Session::nbytes);
  py::class_<Stack>(m, "Stack")
      .def(py::init<const std::string&, Index, Index, Index, bool, const std::string&,
                    const py::list&, const py::dict&>(),
           py::arg("cell"), py::arg("input_size"), py::arg("hidden_size"), py::arg("num_layers"),
           py::arg("batch_first"), py::arg("dtype"), py::arg("weights"), py::arg("options"))
      .def("session", &Stack::new_session, py::arg("T"), py::arg("B"), py::arg("longest"),
           py::arg("batch") = py::none(), py::arg("begin") = 0, py::keep_alive<0, 1>())
      .def("tape_nbytes", &Stack::tape_nbytes, py::arg("T"), py::arg("B"))
      .def("advance", &Stack::advance, py::arg("x"), py::arg("state"),
           py::arg("batch") = py::none())
      .def("record", &Stack::record, py::arg("x"), py::arg("state"), py::arg("batch") = py::none())
      .def("reverse", &Stack::reverse, py::arg("tape"), py::arg("grad_y"), py::arg("grad_state"),
           py::arg("need_x"), py::arg("grad_cells") = py::none());
}

}  // namespace fastbptt::bindings
