// The rules that run forward in time: memory and order; the arithmetic is in the kernels. Streams
// are done one after another, so that sums over them have one order; the threads share the
// parameters of RTRL.

#include "dispatch/dispatch.h"
#include "fastbptt/random.h"
#include "fastbptt/runtime.h"
#include "online/learners.h"
#include "online/online_kernels.h"
#include "threads/pool.h"

namespace fastbptt {
namespace {

// Room behind the end of an array, for whole packets.
constexpr Index room = 16;

template <class S>
const OnlineKernels<S>& online_kernels() {
  if constexpr (std::is_same_v<S, float>)
    return online_table().f32;
  else
    return online_table().f64;
}

template <class S>
class ForwardRule : public OnlineLearner<S> {
 public:
  ForwardRule(const OnlineShape& shape, const Weights<const S>* weights,
              const OnlineOptions& options)
      : rule_(options.rule),
        shape_(shape.stack.layer(0)),
        weights_(weights[0]),
        B_(shape.B),
        V_(shape.classes),
        lstm_(has_cell_state(shape_.cell)),
        I_(shape_.input_size),
        H_(shape_.hidden_size),
        rows_(gates(shape_.cell) * H_),
        C_(I_ + H_ + (weights_.b_ih ? 2 : 0)),
        kernel_(online_kernels<S>()),
        seed_(static_cast<std::int64_t>(options.seed)) {
    check_size(double(rows_) * C_ + double(V_) * I_);
    const Index parameters = rows_ * C_ + V_ * I_, width = kernel_.panel_width;
    panels_ = (parameters + width - 1) / width;
    const double kept = rule_ == Rule::rtrl   ? double(panels_) * width * H_
                        : rule_ == Rule::uoro ? double(parameters)
                                              : double(rows_) * C_;
    check_size(kept * B_ * 2);
    kept_ = static_cast<Index>(kept);
    parameters_ = parameters;
    h_ = zeroed<S>(B_ * H_);
    c_ = zeroed<S>(lstm_ ? B_ * H_ : 0);
    next_h_ = zeroed<S>(B_ * (H_ + room));
    next_c_ = zeroed<S>(B_ * (H_ + room));
    derivatives_ = zeroed<S>(B_ * derivatives_size());
    influence_h_ = zeroed<S>(B_ * kept_);
    const bool two = lstm_ && (rule_ == Rule::rtrl || rule_ == Rule::snap1 || rule_ == Rule::eprop);
    influence_c_ = zeroed<S>(two ? B_ * kept_ : 0);
    grads_ = zeroed<S>(panels_ * width);
    const Index units = lstm_ ? 2 : 1;
    if (rule_ == Rule::rtrl) {
      jacobian_ = zeroed<S>(units * H_ * H_);
      embedded_ = zeroed<S>(V_ ? units * H_ * I_ : 0);
    }
    if (rule_ == Rule::uoro) {
      tangent_h_ = zeroed<S>(B_ * H_);
      tangent_c_ = zeroed<S>(lstm_ ? B_ * H_ : 0);
      norms_ = zeroed<double>(B_);
      signs_ = zeroed<S>(units * H_);
    }
    scratch_ = zeroed<S>(std::max({(3 * rows_ + 3 * H_ + I_), H_ * std::max(H_, I_)}) + room);
    moved_.assign(B_, 0);
    class_.assign(B_, -1);
  }

  void attempt(const S* x, const std::int64_t* classes, const std::uint8_t* present,
               S* y) override {
    for (Index b = 0; b < B_; ++b) {
      moved_[b] = !present || present[b];
      class_[b] = classes ? classes[b] : -1;
      if (moved_[b]) {
        kernel_.step({shape_,
                      weights_,
                      x + b * I_,
                      {h_.data() + b * H_, lstm_ ? c_.data() + b * H_ : nullptr},
                      {next_h(b), next_c(b)},
                      derivatives(b),
                      scratch_.data()});
      }
      const S* const h = moved_[b] ? next_h(b) : h_.data() + b * H_;
      std::copy_n(h, H_, y + b * H_);
    }
  }

  void keep(const S* grad_y) override {
    if (rule_ == Rule::rtrl) share_out();
    for (Index b = 0; b < B_; ++b) {
      const S* grad = grad_y ? grad_y + b * H_ : nullptr;
      if (grad && std::all_of(grad, grad + H_, [](S v) { return v == 0; })) grad = nullptr;
      if (!moved_[b] && !grad) continue;
      if (rule_ == Rule::rtrl)
        influence(b, grad);
      else if (rule_ == Rule::uoro)
        rank_one(b, grad);
      else
        trace(b, grad);
      if (!moved_[b]) continue;
      std::copy_n(next_h(b), H_, h_.data() + b * H_);
      if (lstm_) std::copy_n(next_c(b), H_, c_.data() + b * H_);
    }
    ++steps_;
  }

  void gather(const Weights<S>* to, S* grad_embedding) override {
    const Index bias = weights_.b_ih ? 1 : 0;
    const auto add = [](Index n, const S* from, S* sum) {
      for (Index k = 0; k < n; ++k) sum[k] += from[k];
    };
    for (Index row = 0; row < rows_; ++row) {
      const S* const from = grads_.data() + row * C_;
      add(I_, from, to->w_ih + row * I_);
      add(H_, from + I_ + bias, to->w_hh + row * H_);
      if (bias) {
        to->b_ih[row] += from[I_];
        to->b_hh[row] += from[C_ - 1];
      }
    }
    if (V_) add(V_ * I_, grads_.data() + rows_ * C_, grad_embedding);
    std::fill_n(grads_.data(), grads_.size(), S(0));
  }

  void reset(const std::uint8_t* rows) override {
    for (Index b = 0; b < B_; ++b) {
      if (!rows[b]) continue;
      for (const auto& [buffer, size] : {std::pair<const Buffer<S>*, Index>{&h_, H_},
                                         {&c_, H_},
                                         {&influence_h_, kept_},
                                         {&influence_c_, kept_},
                                         {&tangent_h_, H_},
                                         {&tangent_c_, H_}}) {
        if (buffer->size()) std::fill_n(buffer->data() + b * size, size, S(0));
      }
      if (norms_.size()) norms_.data()[b] = 0;
    }
  }

  std::vector<OnlineField> fields() override {
    using Kind = OnlineField::Kind;
    std::vector<OnlineField> all;
    for (const auto& [name, buffer] : {std::pair<const char*, const Buffer<S>*>{"h", &h_},
                                       {"c", &c_},
                                       {"influence_h", &influence_h_},
                                       {"influence_c", &influence_c_},
                                       {"tangent_h", &tangent_h_},
                                       {"tangent_c", &tangent_c_},
                                       {"gathered", &grads_}}) {
      if (buffer->size()) all.push_back({name, Kind::scalar, buffer->data(), buffer->size()});
    }
    if (rule_ == Rule::uoro) {
      all.push_back({"norms", Kind::real, norms_.data(), B_});
      all.push_back({"seed", Kind::integer, &seed_, 1});
      all.push_back({"step", Kind::integer, &steps_, 1});
    }
    return all;
  }

 private:
  Index derivatives_size() const { return 5 * (H_ + room) + 3 * (rows_ + room) + 2 * (C_ + room); }
  S* next_h(Index b) const { return next_h_.data() + b * (H_ + room); }
  S* next_c(Index b) const { return next_c_.data() + b * (H_ + room); }
  Derivatives<S> derivatives(Index b) const {
    S* at = derivatives_.data() + b * derivatives_size();
    const auto take = [&at](Index n) {
      S* const start = at;
      at += n + room;
      return start;
    };
    return {take(H_),    take(H_), take(H_), take(rows_), take(rows_),
            take(rows_), take(C_), take(C_), take(H_),    take(H_)};
  }

  void influence(Index b, const S* grad) {
    InfluenceJob<S> job{};
    job.shape = shape_;
    job.weights = weights_;
    job.d = derivatives(b);
    job.moved = moved_[b];
    job.row = class_[b];
    if (job.moved) {
      S* const embedded = job.row >= 0 ? embedded_.data() : nullptr;
      kernel_.jacobian({shape_, weights_, job.d, jacobian_.data(), embedded, scratch_.data()});
    }
    job.jacobian = jacobian_.data();
    job.embedded = embedded_.data();
    job.h = influence_h_.data() + b * kept_;
    job.c = lstm_ ? influence_c_.data() + b * kept_ : nullptr;
    job.grad_h = grad;
    job.grads = grads_.data();
    job.parameters = parameters_;
    run_parts(parts_, [&](int p) {
      InfluenceJob<S> part = job;
      part.begin = panels_ * p / parts_;
      part.end = panels_ * (p + 1) / parts_;
      part.scratch = panel_scratch_.data() + p * panel_scratch();
      kernel_.influence(part);
    });
  }

  // How RTRL is shared out, and the memory for that: before a step changes anything.
  void share_out() {
    const double work = 2.0 * (lstm_ ? 2 * H_ : H_) * H_ * parameters_;
    parts_ = static_cast<int>(std::min<double>(
        {double(get_num_threads()), double(panels_), std::max(1.0, work / flops_a_thread)}));
    const Index needed = parts_ * panel_scratch();
    if (panel_scratch_.size() < needed) panel_scratch_ = Buffer<S>(needed);
  }
  Index panel_scratch() const { return 2 * H_ * kernel_.panel_width; }

  void trace(Index b, const S* grad) {
    kernel_.trace({shape_, weights_, derivatives(b), moved_[b] != 0, rule_ == Rule::snap1,
                   influence_h_.data() + b * kept_,
                   lstm_ ? influence_c_.data() + b * kept_ : nullptr, grad, grads_.data(),
                   scratch_.data()});
    // The embedding has the error of the step itself.
    if (moved_[b] && grad && class_[b] >= 0) {
      kernel_.input({shape_, weights_, derivatives(b), grad,
                     grads_.data() + rows_ * C_ + class_[b] * I_, scratch_.data()});
    }
  }

  void rank_one(Index b, const S* grad) {
    if (moved_[b]) {
      std::uint32_t words[draw_group];
      for (Index k = 0; k < signs_.size(); ++k) {
        if (k % draw_group == 0) {
          draw_words(static_cast<std::uint64_t>(seed_), {Draw::sign, 0, Index(steps_), b},
                     k / draw_group, words);
        }
        signs_.data()[k] = words[k % draw_group] & 1 ? S(1) : S(-1);
      }
    }
    kernel_.rank_one({shape_, weights_, derivatives(b), moved_[b] != 0, signs_.data(),
                      tangent_h_.data() + b * H_, lstm_ ? tangent_c_.data() + b * H_ : nullptr,
                      influence_h_.data() + b * kept_, kept_, class_[b], norms_.data() + b, grad,
                      grads_.data(), scratch_.data()});
  }

  Rule rule_;
  LayerShape shape_;
  Weights<const S> weights_;
  Index B_, V_;
  bool lstm_;
  Index I_, H_, rows_, C_;
  const OnlineKernels<S>& kernel_;
  std::int64_t seed_;
  std::int64_t steps_ = 0;  // kept so far
  Index panels_ = 0, parameters_ = 0;
  int parts_ = 1;
  Index kept_ = 0;  // values of the influence that a stream keeps, of h
  Buffer<S> h_, c_, next_h_, next_c_, derivatives_;
  Buffer<S> influence_h_, influence_c_, grads_;
  Buffer<S> jacobian_, embedded_, scratch_, panel_scratch_;
  Buffer<S> tangent_h_, tangent_c_, signs_;
  Buffer<double> norms_;
  std::vector<std::uint8_t> moved_;
  std::vector<Index> class_;
};

}  // namespace

template <class S>
std::unique_ptr<OnlineLearner<S>> new_forward_rule(const OnlineShape& shape,
                                                   const Weights<const S>* weights,
                                                   const OnlineOptions& options) {
  return std::make_unique<ForwardRule<S>>(shape, weights, options);
}

template std::unique_ptr<OnlineLearner<float>> new_forward_rule(const OnlineShape&,
                                                                const Weights<const float>*,
                                                                const OnlineOptions&);
template std::unique_ptr<OnlineLearner<double>> new_forward_rule(const OnlineShape&,
                                                                 const Weights<const double>*,
                                                                 const OnlineOptions&);

}  // namespace fastbptt
