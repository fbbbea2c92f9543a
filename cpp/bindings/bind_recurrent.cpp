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

// What one record kept, and all that its reverse needs again.
struct TapeData {
  std::uint64_t stack = 0;  // Stack::id
  Index T = 0;
  Index B = 0;
  std::atomic<bool> consumed{false};
  virtual Index nbytes() const = 0;
  virtual void clear() = 0;
  virtual ~TapeData() = default;
};

template <class S>
struct TapeOf : TapeData {
  Buffer<S> steps;
  SequenceArray<S> x;
  py::array y;
  Sequence<const S> y_view;
  StateArrays<S> initial;
  Index nbytes() const override { return steps.size() * Index(sizeof(S)); }
  void clear() override {
    steps = Buffer<S>();
    x = SequenceArray<S>();
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
 public:
  Stack(const std::string& cell, Index input_size, Index hidden_size, Index num_layers,
        bool batch_first, const std::string& dtype, const py::list& weights)
      : shape_{cell_of(cell), input_size, hidden_size, num_layers}, batch_first_(batch_first) {
    if (dtype != "float32" && dtype != "float64") {
      throw py::value_error("dtype: got '" + dtype + "', wanted 'float32' or 'float64'");
    }
    is_double_ = dtype == "float64";
    for (const auto& [name, size] : {std::pair<const char*, Index>{"input_size", input_size},
                                     {"hidden_size", hidden_size},
                                     {"num_layers", num_layers}}) {
      if (size < 1) {
        throw py::value_error(std::string(name) + ": got " + std::to_string(size) +
                              ", wanted at least 1");
      }
    }
    if (static_cast<Index>(weights.size()) != 4 * num_layers) {
      throw py::value_error("weights: got " + std::to_string(weights.size()) + " arrays, wanted " +
                            std::to_string(4 * num_layers));
    }
    if (is_double_)
      keep<double>(weights);
    else
      keep<float>(weights);
  }

  // For parts of at most `longest` steps of a sequence of T steps of B rows.
  std::unique_ptr<Session> new_session(Index T, Index B, Index longest) const;

  // Of the tape of T steps of B rows.
  Index tape_nbytes(Index T, Index B) const {
    return tape_size(shape_, T, B) * Index(is_double_ ? sizeof(double) : sizeof(float));
  }

  // A whole sequence in one call.
  py::tuple advance(const py::object& x, const py::object& state) const {
    return is_double_ ? whole_advance<double>(x, state) : whole_advance<float>(x, state);
  }
  py::tuple record(const py::object& x, const py::object& state) const {
    return is_double_ ? whole_record<double>(x, state) : whole_record<float>(x, state);
  }
  py::tuple reverse(const Tape& tape, const py::object& grad_y, const py::object& grad_state,
                    bool need_x) const {
    return is_double_ ? whole_reverse<double>(tape, grad_y, grad_state, need_x)
                      : whole_reverse<float>(tape, grad_y, grad_state, need_x);
  }

 private:
  template <class>
  friend class SessionOf;

  template <class S>
  void keep(const py::list& weights) {
    const Index rows = gates(shape_.cell) * shape_.hidden_size;
    for (Index i = 0; i < static_cast<Index>(weights.size()); ++i) {
      const Index kind = i % 4;
      const py::object weight = weights[i];
      if (kind >= 2 && weight.is_none()) {
        weights_.emplace_back();
        continue;
      }
      const Index columns = kind == 0 ? shape_.layer(i / 4).input_size : shape_.hidden_size;
      weights_.push_back(kind < 2 ? checked<S>("weights", weight, {rows, columns})
                                  : checked<S>("weights", weight, {rows}));
      mutable_data<S>("weights", *weights_.back());
    }
  }

  // The parameters as they are now; NumPy lets nobody move them while they are referred to here.
  template <class S>
  std::vector<Weights<const S>> weights() const {
    std::vector<Weights<const S>> layers(shape_.num_layers);
    const auto pointer = [this](Index i) { return weights_[i] ? data<S>(*weights_[i]) : nullptr; };
    for (Index l = 0; l < shape_.num_layers; ++l) {
      layers[l] = {pointer(4 * l), pointer(4 * l + 1), pointer(4 * l + 2), pointer(4 * l + 3)};
    }
    return layers;
  }

  template <class S>
  StateArrays<S> checked_state(const char* name, const py::object& state, Index B) const {
    StateArrays<S> result;
    if (state.is_none()) return result;
    const Index L = shape_.num_layers, H = shape_.hidden_size;
    const auto part = [&](const char* part_name, const py::handle& array) {
      return contiguous(checked<S>(part_name, array, {L, B, H}));
    };
    if (has_cell_state(shape_.cell)) {
      const bool pair = (py::isinstance<py::tuple>(state) || py::isinstance<py::list>(state)) &&
                        py::len(state) == 2;
      if (!pair) {
        throw py::type_error(
            std::string(name) + ": got " + text_of(py::type::of(state).attr("__name__")) +
            ", wanted a tuple (h, c) of two arrays of shape " + shape_text({L, B, H}));
      }
      const auto items = py::reinterpret_borrow<py::sequence>(state);
      result.h = part((std::string(name) + "[0]").c_str(), py::object(items[0]));
      result.c = part((std::string(name) + "[1]").c_str(), py::object(items[1]));
      result.view = {data<S>(result.h), data<S>(result.c)};
    } else {
      result.h = part(name, state);
      result.view = {data<S>(result.h), nullptr};
    }
    return result;
  }

  template <class S>
  py::array new_array(Index a, Index b, Index c) const {
    return py::array(py::dtype::of<S>(), std::vector<Index>{a, b, c});
  }

  // A new state for results, and the object that the caller gets for it.
  template <class S>
  std::pair<State<S>, py::object> new_state(Index B) const {
    const Index L = shape_.num_layers, H = shape_.hidden_size;
    py::array h = new_array<S>(L, B, H);
    State<S> view{static_cast<S*>(h.mutable_data()), nullptr};
    if (!has_cell_state(shape_.cell)) return {view, std::move(h)};
    py::array c = new_array<S>(L, B, H);
    view.c = static_cast<S*>(c.mutable_data());
    return {view, py::make_tuple(std::move(h), std::move(c))};
  }

  // One forward run: the arguments checked, the results allocated.
  template <class S>
  struct Call {
    Index B;
    SequenceArray<S> x;
    StateArrays<S> initial;
    py::array y;
    py::object final_state;
    Forward<S> run;
  };

  template <class S>
  Call<S> prepare(const py::object& x, const py::object& state, bool batch_first) const {
    Call<S> call;
    call.x = SequenceArray<S>(checked<S>("x", x, {-1, -1, shape_.input_size}), batch_first);
    const py::array& input = call.x.array();
    const Index T = input.shape(batch_first ? 1 : 0), B = input.shape(batch_first ? 0 : 1);
    call.B = B;
    if (B < 1) {
      throw py::value_error("x: got shape " + shape_text(shape_of(input)) +
                            ", wanted a batch of at least 1");
    }
    const Index H = shape_.hidden_size;
    call.initial = checked_state<S>("state", state, B);
    call.y = batch_first ? new_array<S>(B, T, H) : new_array<S>(T, B, H);
    auto [final, object] = new_state<S>(B);
    call.final_state = std::move(object);
    const Sequence<S> y{static_cast<S*>(call.y.mutable_data()), batch_first ? H : B * H,
                        batch_first ? T * H : H};
    call.run = {T, call.x.view(), call.initial.view, y, final};
    return call;
  }

  template <class S>
  std::unique_ptr<fastbptt::Session<S>> session(Index T, Index B, Index longest) const {
    const std::vector<Weights<const S>> now = weights<S>();
    return std::make_unique<fastbptt::Session<S>>(shape_, now.data(), T, B, longest);
  }

  template <class S>
  static py::tuple advance_in(fastbptt::Session<S>& session, Call<S> call) {
    without_gil([&](Interrupt interrupt) { session.advance(call.run, interrupt); });
    return py::make_tuple(std::move(call.y), std::move(call.final_state));
  }

  template <class S>
  py::tuple record_in(fastbptt::Session<S>& session, Call<S> call) const {
    auto tape = std::make_unique<TapeOf<S>>();
    tape->steps = Buffer<S>(tape_size(shape_, call.run.steps, call.B));
    without_gil(
        [&](Interrupt interrupt) { session.record(call.run, tape->steps.data(), interrupt); });
    tape->stack = id_;
    tape->T = call.run.steps;
    tape->B = call.B;
    tape->x = call.x;
    tape->y = call.y;
    tape->y_view = {call.run.y.data, call.run.y.step, call.run.y.row};
    tape->initial = call.initial;
    return py::make_tuple(std::move(call.y), std::move(call.final_state),
                          std::make_shared<Tape>(std::move(tape)));
  }

  template <class S>
  TapeOf<S>& own(const Tape& handle) const {
    TapeData& any = handle.get();
    if (any.stack != id_) {
      throw py::value_error(
          "tape: got a tape of another layer, wanted one that this layer recorded");
    }
    return static_cast<TapeOf<S>&>(any);
  }

  // The gradients of input and state, in that order.
  template <class S>
  std::pair<py::object, py::object> reverse_in(fastbptt::Session<S>& session, TapeOf<S>& tape,
                                               const py::object& grad_y,
                                               const py::object& grad_state, bool need_x,
                                               bool batch_first) const {
    const Index T = tape.T, B = tape.B, I = shape_.input_size, H = shape_.hidden_size;
    const Index first = batch_first ? B : T, second = batch_first ? T : B;

    SequenceArray<S> dy;
    if (!grad_y.is_none()) {
      dy = SequenceArray<S>(checked<S>("grad_y", grad_y, {first, second, H}), batch_first);
    }
    const StateArrays<S> final = checked_state<S>("grad_state", grad_state, B);

    py::object grad_x = py::none();
    Sequence<S> dx;
    if (need_x) {
      py::array array = new_array<S>(first, second, I);
      dx = {static_cast<S*>(array.mutable_data()), batch_first ? I : B * I,
            batch_first ? T * I : I};
      grad_x = std::move(array);
    }
    auto [initial, grad_initial] = new_state<S>(B);

    if (tape.consumed.exchange(true)) {
      throw py::value_error(
          "tape: it has been used by an earlier backward; wanted a tape of a new forward");
    }
    try {
      // reverse writes neither y nor the final state of the run.
      const Forward<S> run{T,
                           tape.x.view(),
                           tape.initial.view,
                           {const_cast<S*>(tape.y_view.data), tape.y_view.step, tape.y_view.row},
                           {}};
      const Reverse<S> grad{tape.steps.data(), dy.view(), final.view, dx, initial};
      without_gil([&](Interrupt interrupt) { session.reverse(run, grad, interrupt); });
    } catch (...) {
      tape.consumed = false;  // nothing of the tape was changed: it may be used again
      throw;
    }
    tape.clear();
    return {std::move(grad_x), std::move(grad_initial)};
  }

  // The weight gradients that a session has gathered, as new arrays.
  template <class S>
  py::list weight_gradients(fastbptt::Session<S>& session) const {
    const Index L = shape_.num_layers;
    py::list grads;
    std::vector<Weights<S>> to(L);
    for (Index l = 0; l < L; ++l) {
      S* pointers[4] = {};
      for (Index kind = 0; kind < 4; ++kind) {
        const auto& weight = weights_[4 * l + kind];
        if (!weight) {
          grads.append(py::none());
          continue;
        }
        py::array grad(weight->dtype(), shape_of(*weight));
        pointers[kind] = static_cast<S*>(grad.mutable_data());
        std::fill(pointers[kind], pointers[kind] + grad.size(), S(0));
        grads.append(std::move(grad));
      }
      to[l] = {pointers[0], pointers[1], pointers[2], pointers[3]};
    }
    py::gil_scoped_release release;
    session.finish(to.data());
    return grads;
  }

  template <class S>
  py::tuple whole_advance(const py::object& x, const py::object& state) const {
    Call<S> call = prepare<S>(x, state, batch_first_);
    const auto own_session = session<S>(call.run.steps, call.B, call.run.steps);
    return advance_in<S>(*own_session, std::move(call));
  }
  template <class S>
  py::tuple whole_record(const py::object& x, const py::object& state) const {
    Call<S> call = prepare<S>(x, state, batch_first_);
    const auto own_session = session<S>(call.run.steps, call.B, call.run.steps);
    return record_in<S>(*own_session, std::move(call));
  }
  template <class S>
  py::tuple whole_reverse(const Tape& handle, const py::object& grad_y,
                          const py::object& grad_state, bool need_x) const {
    TapeOf<S>& tape = own<S>(handle);
    const auto own_session = session<S>(tape.T, tape.B, tape.T);
    auto [grad_x, grad_initial] =
        reverse_in<S>(*own_session, tape, grad_y, grad_state, need_x, batch_first_);
    return py::make_tuple(std::move(grad_x), std::move(grad_initial),
                          weight_gradients<S>(*own_session));
  }

  static std::uint64_t next_id() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
  }

  std::uint64_t id_ = next_id();
  StackShape shape_;
  bool batch_first_;
  bool is_double_ = false;
  std::vector<std::optional<py::array>> weights_;
};

// The verbs over parts of one sequence; time comes first, whatever the stack's own order.
class Session {
 public:
  virtual ~Session() = default;
  virtual py::tuple advance(const py::object& x, const py::object& state) = 0;
  virtual py::tuple record(const py::object& x, const py::object& state) = 0;
  virtual py::tuple reverse(const Tape& tape, const py::object& grad_y,
                            const py::object& grad_state, bool need_x) = 0;
  virtual py::list finish() = 0;
  virtual Index nbytes() const = 0;
};

template <class S>
class SessionOf : public Session {
 public:
  SessionOf(const Stack& stack, Index T, Index B, Index longest)
      : stack_(stack), B_(B), longest_(longest), session_(stack.session<S>(T, B, longest)) {}
  py::tuple advance(const py::object& x, const py::object& state) override {
    return Stack::advance_in<S>(*session_, prepare(x, state));
  }
  py::tuple record(const py::object& x, const py::object& state) override {
    return stack_.record_in<S>(*session_, prepare(x, state));
  }
  py::tuple reverse(const Tape& handle, const py::object& grad_y, const py::object& grad_state,
                    bool need_x) override {
    TapeOf<S>& tape = stack_.own<S>(handle);
    check(tape.T, tape.B, "tape");
    auto [x, state] = stack_.reverse_in<S>(*session_, tape, grad_y, grad_state, need_x, false);
    return py::make_tuple(std::move(x), std::move(state));
  }
  py::list finish() override { return stack_.weight_gradients<S>(*session_); }
  Index nbytes() const override { return session_->nbytes(); }

 private:
  Stack::Call<S> prepare(const py::object& x, const py::object& state) const {
    auto call = stack_.prepare<S>(x, state, false);
    check(call.run.steps, call.B, "x");
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
  Index B_;
  Index longest_;
  std::unique_ptr<fastbptt::Session<S>> session_;
};

std::unique_ptr<Session> Stack::new_session(Index T, Index B, Index longest) const {
  for (const auto& [name, size] :
       {std::pair<const char*, Index>{"T", T}, {"B", B}, {"longest", longest}}) {
    if (size < 1) {
      throw py::value_error(std::string(name) + ": got " + std::to_string(size) +
                            ", wanted at least 1");
    }
  }
  if (is_double_) return std::make_unique<SessionOf<double>>(*this, T, B, longest);
  return std::make_unique<SessionOf<float>>(*this, T, B, longest);
}

}  // namespace

void bind_recurrent(py::module_& m) {
  py::class_<Tape, std::shared_ptr<Tape>>(m, "Tape")
      .def_property_readonly("nbytes", [](const Tape& tape) { return tape.get().nbytes(); })
      .def_property_readonly("consumed",
                             [](const Tape& tape) { return tape.get().consumed.load(); });
  py::class_<Session>(m, "Session")
      .def("advance", &Session::advance, py::arg("x"), py::arg("state"))
      .def("record", &Session::record, py::arg("x"), py::arg("state"))
      .def("reverse", &Session::reverse, py::arg("tape"), py::arg("grad_y"), py::arg("grad_state"),
           py::arg("need_x"))
      .def("finish", &Session::finish)
      .def_property_readonly("nbytes", &Session::nbytes);
  py::class_<Stack>(m, "Stack")
      .def(py::init<const std::string&, Index, Index, Index, bool, const std::string&,
                    const py::list&>(),
           py::arg("cell"), py::arg("input_size"), py::arg("hidden_size"), py::arg("num_layers"),
           py::arg("batch_first"), py::arg("dtype"), py::arg("weights"))
      .def("session", &Stack::new_session, py::arg("T"), py::arg("B"), py::arg("longest"),
           py::keep_alive<0, 1>())
      .def("tape_nbytes", &Stack::tape_nbytes, py::arg("T"), py::arg("B"))
      .def("advance", &Stack::advance, py::arg("x"), py::arg("state"))
      .def("record", &Stack::record, py::arg("x"), py::arg("state"))
      .def("reverse", &Stack::reverse, py::arg("tape"), py::arg("grad_y"), py::arg("grad_state"),
           py::arg("need_x"));
}

}  // namespace fastbptt::bindings
