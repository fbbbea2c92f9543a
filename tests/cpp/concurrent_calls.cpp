// Calls from several threads at once give the bits that they give alone; made for ThreadSanitizer.
//
//   concurrent_calls [ROUNDS [CALLERS]]
#include <cstring>
#include <thread>

#include "drawing.h"
#include "fastbptt/readout.h"
#include "threads/pool.h"

namespace fastbptt::tests {
namespace {

constexpr Index T = 24, I = 17, H = 45, L = 2, N = 33;
constexpr int threads_a_call = 3;

template <class S>
struct Model {
  StackShape shape;
  WeightArrays<S> weights;
  Array<S> readout{N * H};
  Array<S> bias{N};

  Model(Random& random, Cell cell) : shape{cell, I, H, L}, weights(shape, true, 0) {
    const auto small = [&] { return random.uniform(0.15); };
    for (const Array<S>& weight : weights.arrays) weight.draw(small);
    readout.draw(small);
    bias.draw(small);
  }
};

// What a caller has of its own: a training step's input and results.
template <class S>
class Step {
 public:
  Step(Random& random, const Model<S>& model, Index rows)
      : B(rows),
        model_(model),
        x_(Layout::time_major, T, B, I, 0),
        y_(Layout::time_major, T, B, H, 0),
        tape_(tape_size(model.shape, T, B)),
        final_(model.shape, B, 0),
        grad_x_(Layout::time_major, T, B, I, 0),
        grad_initial_(model.shape, B, 0),
        grads_(model.shape, true, 0) {
    x_.array().draw([&] { return random.normal(); });
    for (std::int64_t& target : targets_) target = random.between(0, N - 1);
  }

  // record, readout_loss, reverse and finish; then all results one after another.
  std::vector<S> run() {
    for (const Array<S>& grad : grads_.arrays) grad.fill(S(0));
    grad_readout_.fill(S(0));
    grad_bias_.fill(S(0));
    const auto weights = model_.weights.template views<const S>();
    Session<S> session(model_.shape, weights.data(), {T, B});
    const Forward<S> forward{T, x_.const_view(), {}, y_.view(), final_.view()};
    session.record(forward, tape_.data());
    ReadoutLoss<S> job{};
    job.readout = {T * B, H, N, y_.array().data(), model_.readout.data(), model_.bias.data()};
    job.loss = Loss::cross_entropy;
    job.classes = targets_.data();
    job.ignore_index = -100;
    job.scale = 1.0 / double(T * B);
    job.grad_x = dy_.data();
    job.grad_weight = grad_readout_.data();
    job.grad_bias = grad_bias_.data();
    const double loss = readout_loss(job);
    const auto grad_views = grads_.views();
    session.reverse(
        forward,
        Reverse<S>{tape_.data(), {dy_.data(), B * H, H}, {}, grad_x_.view(), grad_initial_.view()});
    session.finish(grad_views.data());

    std::vector<S> results{S(loss)};
    const auto take = [&](const Array<S>& array) {
      results.insert(results.end(), array.data(), array.data() + array.size());
    };
    take(y_.array());
    take(final_.h);
    take(final_.c);
    take(grad_x_.array());
    take(grad_initial_.h);
    take(grad_initial_.c);
    take(grad_readout_);
    take(grad_bias_);
    for (const Array<S>& grad : grads_.arrays) take(grad);
    return results;
  }

 private:
  const Index B;
  const Model<S>& model_;
  SequenceArray<S> x_;
  SequenceArray<S> y_;
  Array<S> tape_;
  StateArrays<S> final_;
  SequenceArray<S> grad_x_;
  StateArrays<S> grad_initial_;
  WeightArrays<S> grads_;
  Array<S> dy_{T * B * H};
  Array<S> grad_readout_{N * H};
  Array<S> grad_bias_{N};
  std::vector<std::int64_t> targets_ = std::vector<std::int64_t>(T * B);
};

// body(caller) in as many threads.
template <class F>
void in_threads(int callers, F&& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

template <class S>
bool training_steps(Cell cell, Index B, int rounds, int callers) {
  Random random(7);
  const Model<S> model(random, cell);
  std::vector<std::unique_ptr<Step<S>>> steps;
  for (int i = 0; i < callers; ++i) steps.push_back(std::make_unique<Step<S>>(random, model, B));
  // All at once first: the pool is at its youngest then.
  std::vector<std::vector<std::vector<S>>> results(callers);
  in_threads(callers, [&](int i) {
    set_num_threads(threads_a_call);
    for (int round = 0; round < rounds; ++round) results[i].push_back(steps[i]->run());
  });
  for (int i = 0; i < callers; ++i) {
    const std::vector<S> alone = steps[i]->run();
    for (const std::vector<S>& together : results[i]) {
      if (std::memcmp(together.data(), alone.data(), alone.size() * sizeof(S)) == 0) continue;
      std::fprintf(stderr, "%s, %zu bytes a number: caller %d got other bits beside others\n",
                   name_of(cell), sizeof(S), i);
      return false;
    }
  }
  return true;
}

// Regions of next to no work: each part once, by its region's end.
bool small_regions(int rounds, int callers) {
  std::vector<int> wrong(callers, 0);
  in_threads(callers, [&](int i) {
    for (int round = 0; round < rounds; ++round) {
      std::vector<int> done(2 + (round + i) % 5, 0);
      run_parts(static_cast<int>(done.size()), [&](int p) { ++done[p]; });
      for (int count : done) wrong[i] += count != 1;
    }
  });
  for (int count : wrong) {
    if (count == 0) continue;
    std::fprintf(stderr, "run_parts: %d parts were not run just once\n", count);
    return false;
  }
  return true;
}

// What the caller's part throws comes out when no worker is in the region any more.
bool exceptions(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    std::vector<int> done(4, 0);
    try {
      run_parts(4, [&](int p) {
        if (p == 0) throw std::runtime_error("part 0");
        ++done[p];
      });
      std::fprintf(stderr, "run_parts: the caller's exception got lost\n");
      return false;
    } catch (const std::runtime_error&) {
    }
  }
  return true;
}

}  // namespace
}  // namespace fastbptt::tests

int main(int argc, char** argv) {
  using namespace fastbptt;
  using namespace fastbptt::tests;
  const std::string isa = isa_or_exit();
  const int rounds = static_cast<int>(argument(argc, argv, 1, 3));
  const int callers = static_cast<int>(argument(argc, argv, 2, 4));
  bool right = true;
  for (Cell cell :
       {Cell::rnn_tanh, Cell::rnn_relu, Cell::lstm, Cell::gru, Cell::gru_reset_before}) {
    // Few rows are worked on by all threads together, more are shared out.
    for (Index B : {5, 13}) {
      right &= training_steps<float>(cell, B, rounds, callers);
      right &= training_steps<double>(cell, B, rounds, callers);
    }
  }
  right &= small_regions(400 * rounds, callers);
  right &= exceptions(20 * rounds);
  std::printf("%s: %d callers, %s\n", isa.c_str(), callers, right ? "same bits" : "wrong");
  return right ? 0 : 1;
}
