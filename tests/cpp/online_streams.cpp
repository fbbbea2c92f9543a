// Random streams through every rule of the online learners. With weights that stay, real-time
// recurrent learning and a window as long as the stream give the gradient of the verbs; the others
// must stay in their memory and give numbers.
//
//   online_streams [SEED [COUNT]]
#include <algorithm>

#include "drawing.h"
#include "fastbptt/online.h"
#include "fastbptt/readout.h"

namespace fastbptt::tests {
namespace {

template <class S>
constexpr double tolerance = sizeof(S) == 4 ? 1e-4 : 1e-11;

template <class S>
class Problem {
 public:
  explicit Problem(Random& random)
      : rule_(static_cast<Rule>(random.between(0, 4))),
        shape_{rule_ == Rule::eprop ? Cell::lstm : static_cast<Cell>(random.between(0, 4)),
               random.between(1, 20), random.between(1, 40),
               rule_ == Rule::truncated ? random.between(1, 3) : 1},
        T_(random.between(1, 9)),
        B_(random.between(1, 4)),
        V_(random.chance(0.5) ? random.between(1, 6) : 0),
        bias_(random.chance(0.7)),
        weights_(shape_, bias_, random.between(0, 1)),
        embedding_(V_ * shape_.input_size),
        x_(T_ * B_ * shape_.input_size),
        errors_(T_ * B_ * shape_.hidden_size),
        classes_(T_ * B_) {
    const auto small = [&] { return random.uniform(0.4); };
    for (const Array<S>& weight : weights_.arrays) weight.draw(small);
    embedding_.draw(small);
    x_.draw([&] { return random.normal(); });
    errors_.draw([&] { return random.normal(); });
    for (Index row = 0; row < T_ * B_; ++row) {
      if (!V_) continue;
      const Index I = shape_.input_size;
      classes_[row] = random.between(0, V_ - 1);
      std::copy_n(embedding_.data() + classes_[row] * I, I, x_.data() + row * I);
    }
    kept_ = random.between(1, 2) == 1;
  }

  // False, and a line on stderr, if something is wrong.
  bool run(unsigned long seed) const {
    WeightArrays<S> grads = zero_weights();
    Array<S> grad_embedding(V_ * shape_.input_size);
    grad_embedding.fill(S(0));
    const auto views = weights_.template views<const S>();
    const auto learner = new_online_learner<S>(
        {shape_, B_, V_}, views.data(),
        {rule_, 1, rule_ == Rule::truncated ? T_ : 1, static_cast<std::uint64_t>(seed)});
    const Index I = shape_.input_size, H = shape_.hidden_size;
    const std::vector<std::uint8_t> present(B_, 1);
    Array<S> y(B_ * H);
    for (Index t = 0; t < T_; ++t) {
      const std::int64_t* const classes = V_ ? classes_.data() + t * B_ : nullptr;
      if (kept_)
        learner->attempt(x_.data(), V_ ? classes_.data() : nullptr, present.data(), y.data());
      learner->attempt(x_.data() + t * B_ * I, classes, present.data(), y.data());
      learner->keep(errors_.data() + t * B_ * H);
      // A window is taken at each step, so that each error is taken once.
      if (rule_ == Rule::truncated || t == T_ - 1) {
        learner->gather(grads.views().data(), grad_embedding.data());
      }
    }
    std::vector<double> got = flat(grads, grad_embedding);
    if (!std::all_of(got.begin(), got.end(), [](double v) { return std::isfinite(v); })) {
      return fail(seed, "a gradient is no number");
    }
    if (rule_ != Rule::truncated && rule_ != Rule::rtrl) return true;
    const std::vector<double> wanted = by_the_verbs();
    double largest = 0, error = 0;
    for (std::size_t k = 0; k < got.size(); ++k) {
      largest = std::max(largest, std::fabs(wanted[k]));
      error = std::max(error, std::fabs(got[k] - wanted[k]));
    }
    return error <= tolerance<S> * largest || fail(seed, "a gradient is wrong");
  }

 private:
  WeightArrays<S> zero_weights() const {
    WeightArrays<S> grads(shape_, bias_, 0);
    for (const Array<S>& grad : grads.arrays) grad.fill(S(0));
    return grads;
  }

  static std::vector<double> flat(const WeightArrays<S>& grads, const Array<S>& embedding) {
    std::vector<double> all = embedding.doubles();
    for (const Array<S>& grad : grads.arrays) {
      const std::vector<double> part = grad.doubles();
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }

  std::vector<double> by_the_verbs() const {
    const Index I = shape_.input_size, H = shape_.hidden_size;
    WeightArrays<S> grads = zero_weights();
    Array<S> grad_embedding(V_ * I), tape(tape_size(shape_, T_, B_)), y(T_ * B_ * H);
    Array<S> grad_x(T_ * B_ * I);
    grad_embedding.fill(S(0));
    const StateArrays<S> final(shape_, B_, 0), grad_initial(shape_, B_, 0);
    const auto views = weights_.template views<const S>();
    Session<S> session(shape_, views.data(), {T_, B_});
    const Forward<S> run{T_, {x_.data(), B_ * I, I}, {}, {y.data(), B_ * H, H}, final.view()};
    session.record(run, tape.data());
    session.reverse(run, {tape.data(),
                          {errors_.data(), B_ * H, H},
                          {},
                          {grad_x.data(), B_ * I, I},
                          grad_initial.view()});
    session.finish(grads.views().data());
    if (V_) {
      embedding_backward(T_ * B_, I, classes_.data(), grad_x.data(), grad_embedding.data());
    }
    return flat(grads, grad_embedding);
  }

  bool fail(unsigned long seed, const char* what) const {
    std::fprintf(stderr, "seed %lu, rule %d, %s%s, L=%td T=%td B=%td I=%td H=%td V=%td: %s\n", seed,
                 static_cast<int>(rule_), name_of(shape_.cell), sizeof(S) == 4 ? " float32" : "",
                 shape_.num_layers, T_, B_, shape_.input_size, shape_.hidden_size, V_, what);
    return false;
  }

  Rule rule_;
  StackShape shape_;
  Index T_, B_, V_;
  bool bias_;
  WeightArrays<S> weights_;
  Array<S> embedding_, x_, errors_;
  std::vector<std::int64_t> classes_;
  bool kept_ = false;  // whether each step comes after one that was only tried
};

int run(int argc, char** argv) {
  const std::string isa = isa_or_exit();
  const unsigned long first = argument(argc, argv, 1, 1), count = argument(argc, argv, 2, 300);
  bool right = true;
  for (unsigned long seed = first; seed < first + count; ++seed) {
    Random random(seed);
    right &=
        random.chance(0.5) ? Problem<float>(random).run(seed) : Problem<double>(random).run(seed);
  }
  std::printf("%s: %lu streams, %s\n", isa.c_str(), count, right ? "all right" : "NOT all right");
  return right ? 0 : 1;
}

}  // namespace
}  // namespace fastbptt::tests

int main(int argc, char** argv) { return fastbptt::tests::run(argc, argv); }
