// Truncated backpropagation over a ring of the last k2 steps: each keeps what its reverse needs and
// the error of its output, and gather reverses the window as one sequence.
//
// A row without input stays where it is, so the error passes such a step unchanged; a row that was
// reset lets no error through. Where there is neither, the whole window is one call of the verb.

#include "fastbptt/readout.h"
#include "online/learners.h"

namespace fastbptt {
namespace {

template <class S>
class Window : public OnlineLearner<S> {
 public:
  Window(const OnlineShape& shape, const Weights<const S>* weights, const OnlineOptions& options)
      : stack_(shape.stack),
        weights_(weights, weights + shape.stack.num_layers),
        B_(shape.B),
        V_(shape.classes),
        k1_(options.k1),
        k2_(options.k2),
        slots_(k2_ + 1),
        lstm_(has_cell_state(stack_.cell)),
        BI_(B_ * stack_.input_size),
        BH_(B_ * stack_.hidden_size),
        state_size_(stack_.num_layers * BH_),
        tape_size_(tape_size(stack_, 1, B_)) {
    check_size(double(slots_) * B_ * stack_.num_layers * 8 *
               (double(stack_.input_size) + stack_.hidden_size));
    const Index c = lstm_ ? 1 : 0;
    for (Steps* steps : {&ring_, &window_}) {
      steps->tape = zeroed<S>(slots_ * tape_size_);
      steps->x = zeroed<S>(slots_ * BI_);
      steps->y = zeroed<S>(slots_ * BH_);
      steps->grad_y = zeroed<S>(slots_ * BH_);
    }
    before_h_ = zeroed<S>(slots_ * state_size_);
    before_c_ = zeroed<S>(slots_ * state_size_ * c);
    h_ = zeroed<S>(state_size_);
    c_ = zeroed<S>(state_size_ * c);
    next_h_ = zeroed<S>(state_size_);
    next_c_ = zeroed<S>(state_size_ * c);
    for (Error& error : errors_) {
      error.h = zeroed<S>(state_size_);
      error.c = zeroed<S>(state_size_ * c);
    }
    grad_x_ = zeroed<S>(V_ ? slots_ * BI_ : 0);
    classes_ = zeroed<std::int64_t>(slots_ * B_);
    absent_ = zeroed<std::uint8_t>(slots_ * B_);
    cut_ = zeroed<std::uint8_t>(slots_ * B_);
    with_error_ = zeroed<std::uint8_t>(slots_);
    cut_next_ = zeroed<std::uint8_t>(B_);
  }

  void attempt(const S* x, const std::int64_t* classes, const std::uint8_t* present,
               S* y) override {
    const Index at = head();
    std::copy_n(x, BI_, ring_.x.data() + at * BI_);
    std::copy_n(h_.data(), state_size_, before_h_.data() + at * state_size_);
    if (lstm_) std::copy_n(c_.data(), state_size_, before_c_.data() + at * state_size_);
    std::uint8_t* const absent = absent_.data() + at * B_;
    for (Index b = 0; b < B_; ++b) {
      absent[b] = present && !present[b];
      classes_.data()[at * B_ + b] = classes ? classes[b] : 0;
    }
    if (any(absent, B_, false)) {
      const Index I = stack_.input_size, H = stack_.hidden_size;
      Session<S> session(stack_, weights_.data(), {1, B_});
      const Forward<S> run{1,
                           {x, BI_, I},
                           {h_.data(), c_.data()},
                           {ring_.y.data() + at * BH_, BH_, H},
                           {next_h_.data(), next_c_.data()}};
      session.record(run, ring_.tape.data() + at * tape_size_);
    }
    for_rows(absent, [&](Index offset, Index n) {
      std::copy_n(h_.data() + offset, n, next_h_.data() + offset);
      if (lstm_) std::copy_n(c_.data() + offset, n, next_c_.data() + offset);
    });
    // Of the last layer h is y, and it is right for the rows without input too.
    std::copy_n(next_h_.data() + state_size_ - BH_, BH_, y);
  }

  void keep(const S* grad_y) override {
    const Index at = head();
    with_error_.data()[at] = grad_y != nullptr;
    if (grad_y) std::copy_n(grad_y, BH_, ring_.grad_y.data() + at * BH_);
    std::copy_n(cut_next_.data(), B_, cut_.data() + at * B_);
    std::fill_n(cut_next_.data(), B_, std::uint8_t(0));
    std::copy_n(next_h_.data(), state_size_, h_.data());
    if (lstm_) std::copy_n(next_c_.data(), state_size_, c_.data());
    counters_[0] = (at + 1) % slots_;
    counters_[1] = std::min<std::int64_t>(counters_[1] + 1, k2_);
    ++counters_[2];
  }

  void gather(const Weights<S>* grads, S* grad_embedding) override {
    const Index n = std::min(Index(counters_[1]), k2_ - k1_ + Index(counters_[2]));
    if (!any(with_error_.data(), slots_, true)) {
      counters_[2] = 0;
      return;
    }
    const Index first = (head() + slots_ - n) % slots_;
    Session<S> session(stack_, weights_.data(), {n, B_});
    for (Error& error : errors_) error.clear();
    for (Index end = n; end > 0;) {
      Index begin = end - 1;
      while (begin > 0 && !has(cut_, first, begin) && !has(absent_, first, begin) &&
             !has(absent_, first, begin - 1)) {
        --begin;
      }
      reverse(session, first, begin, end, grad_embedding);
      for_rows(cut_.data() + slot(first, begin) * B_,
               [&](Index offset, Index rows) { errors_[0].clear(offset, rows); });
      end = begin;
    }
    session.finish(grads, true);
    counters_[2] = 0;
    std::fill_n(with_error_.data(), slots_, std::uint8_t(0));
  }

  void reset(const std::uint8_t* rows) override {
    for (Index b = 0; b < B_; ++b) cut_next_.data()[b] |= rows[b] != 0;
    for_rows(rows, [&](Index offset, Index n) {
      std::fill_n(h_.data() + offset, n, S(0));
      if (lstm_) std::fill_n(c_.data() + offset, n, S(0));
    });
  }

  std::vector<OnlineField> fields() override {
    using Kind = OnlineField::Kind;
    std::vector<OnlineField> all;
    for (const auto& [name, buffer] : {std::pair<const char*, const Buffer<S>*>{"h", &h_},
                                       {"c", &c_},
                                       {"ring_tape", &ring_.tape},
                                       {"ring_x", &ring_.x},
                                       {"ring_y", &ring_.y},
                                       {"ring_grad_y", &ring_.grad_y},
                                       {"ring_h", &before_h_},
                                       {"ring_c", &before_c_}}) {
      if (buffer->size()) all.push_back({name, Kind::scalar, buffer->data(), buffer->size()});
    }
    for (const auto& [name, buffer] :
         {std::pair<const char*, const Buffer<std::uint8_t>*>{"ring_absent", &absent_},
          {"ring_cut", &cut_},
          {"ring_with_error", &with_error_},
          {"cut_next", &cut_next_}}) {
      all.push_back({name, Kind::byte, buffer->data(), buffer->size()});
    }
    all.push_back({"ring_classes", Kind::integer, classes_.data(), classes_.size()});
    all.push_back({"counters", Kind::integer, counters_, 3});
    return all;
  }

  const char* damaged() const override {
    const auto within = [](std::int64_t value, std::int64_t most) {
      return value >= 0 && value <= most;
    };
    constexpr std::int64_t many = std::int64_t(1) << 62;
    if (!within(counters_[0], slots_ - 1) || !within(counters_[1], k2_) ||
        !within(counters_[2], many)) {
      return "counters";
    }
    for (Index k = 0; k < classes_.size(); ++k) {
      if (!within(classes_.data()[k], V_ ? V_ - 1 : 0)) return "ring_classes";
    }
    return nullptr;
  }

 private:
  struct Steps {
    Buffer<S> tape, x, y, grad_y;
  };
  // dL/dstate.
  struct Error {
    Buffer<S> h, c;
    void clear(Index offset, Index n) {
      std::fill_n(h.data() + offset, n, S(0));
      if (c.size()) std::fill_n(c.data() + offset, n, S(0));
    }
    void clear() { clear(0, h.size()); }
    State<S> view() const { return {h.data(), c.data()}; }
  };

  Index head() const { return Index(counters_[0]); }
  Index slot(Index first, Index t) const { return (first + t) % slots_; }
  bool has(const Buffer<std::uint8_t>& marks, Index first, Index t) const {
    return any(marks.data() + slot(first, t) * B_, B_, true);
  }
  static bool any(const std::uint8_t* marks, Index n, bool value) {
    return std::any_of(marks, marks + n, [&](std::uint8_t m) { return (m != 0) == value; });
  }
  // Calls body(offset, H) for the marked rows of every layer of a state.
  template <class F>
  void for_rows(const std::uint8_t* marks, F&& body) const {
    const Index H = stack_.hidden_size;
    for (Index b = 0; b < B_; ++b) {
      if (!marks[b]) continue;
      for (Index l = 0; l < stack_.num_layers; ++l) body((l * B_ + b) * H, H);
    }
  }

  // The error goes from behind step end - 1 to before step begin.
  void reverse(Session<S>& session, Index first, Index begin, Index end, S* grad_embedding) {
    const Index n = end - begin, I = stack_.input_size, H = stack_.hidden_size;
    for (Index t = 0; t < n; ++t) {
      const Index at = slot(first, begin + t);
      std::copy_n(ring_.x.data() + at * BI_, BI_, window_.x.data() + t * BI_);
      std::copy_n(ring_.y.data() + at * BH_, BH_, window_.y.data() + t * BH_);
      if (with_error_.data()[at])
        std::copy_n(ring_.grad_y.data() + at * BH_, BH_, window_.grad_y.data() + t * BH_);
      else
        std::fill_n(window_.grad_y.data() + t * BH_, BH_, S(0));
      copy_tape_step(stack_, B_, ring_.tape.data() + at * tape_size_, window_.tape.data(), n, t);
    }
    const Index start = slot(first, begin);
    const std::uint8_t* const absent = absent_.data() + start * B_;
    Error& error = errors_[0];
    Error& through = errors_[1];
    Error& around = errors_[2];
    const bool holes = any(absent, B_, true);
    if (holes) {
      around.clear();
      for_rows(absent, [&](Index offset, Index rows) {
        std::copy_n(error.h.data() + offset, rows, around.h.data() + offset);
        if (lstm_) std::copy_n(error.c.data() + offset, rows, around.c.data() + offset);
        error.clear(offset, rows);
      });
      const Index last = state_size_ - BH_;
      for (Index b = 0; b < B_; ++b) {
        for (Index j = 0; absent[b] && j < H; ++j) {
          around.h.data()[last + b * H + j] += window_.grad_y.data()[b * H + j];
          window_.grad_y.data()[b * H + j] = 0;
        }
      }
    }
    if (any(absent, B_, false)) {
      const Forward<S> run{n,
                           {window_.x.data(), BI_, I},
                           {before_h_.data() + start * state_size_,
                            lstm_ ? before_c_.data() + start * state_size_ : nullptr},
                           {window_.y.data(), BH_, H},
                           {}};
      const Sequence<S> grad_x = V_ ? Sequence<S>{grad_x_.data(), BI_, I} : Sequence<S>{};
      session.reverse(run, {window_.tape.data(),
                            {window_.grad_y.data(), BH_, H},
                            {error.h.data(), error.c.data()},
                            grad_x,
                            through.view()});
      std::swap(error, through);
      for (Index t = n - 1; V_ && t >= 0; --t) {
        embedding_backward(B_, I, classes_.data() + slot(first, begin + t) * B_,
                           grad_x_.data() + t * BI_, grad_embedding);
      }
    }
    if (!holes) return;
    for_rows(absent, [&](Index offset, Index rows) {
      std::copy_n(around.h.data() + offset, rows, error.h.data() + offset);
      if (lstm_) std::copy_n(around.c.data() + offset, rows, error.c.data() + offset);
    });
  }

  StackShape stack_;
  std::vector<Weights<const S>> weights_;
  Index B_, V_, k1_, k2_, slots_;
  bool lstm_;
  Index BI_, BH_, state_size_, tape_size_;
  Steps ring_, window_;
  Buffer<S> before_h_, before_c_;  // the state before each step of the ring
  Buffer<S> h_, c_, next_h_, next_c_, grad_x_;
  Error errors_[3];
  Buffer<std::int64_t> classes_;
  Buffer<std::uint8_t> absent_;      // rows without input
  Buffer<std::uint8_t> cut_;         // rows that begin anew at the step
  Buffer<std::uint8_t> with_error_;  // steps whose error was not gathered yet
  Buffer<std::uint8_t> cut_next_;
  // The slot of the next step, steps that the ring holds, steps since the last gather.
  std::int64_t counters_[3] = {};
};

}  // namespace

template <class S>
std::unique_ptr<OnlineLearner<S>> new_window(const OnlineShape& shape,
                                             const Weights<const S>* weights,
                                             const OnlineOptions& options) {
  return std::make_unique<Window<S>>(shape, weights, options);
}

template std::unique_ptr<OnlineLearner<float>> new_window(const OnlineShape&,
                                                          const Weights<const float>*,
                                                          const OnlineOptions&);
template std::unique_ptr<OnlineLearner<double>> new_window(const OnlineShape&,
                                                           const Weights<const double>*,
                                                           const OnlineOptions&);

}  // namespace fastbptt
