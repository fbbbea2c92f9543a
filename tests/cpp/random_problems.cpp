// Random problems through the public C++ API, compared with the float64 reference.
//
//   random_problems [SEED [COUNT]]
//
// The instruction set is that of FASTBPTT_ISA. A problem that fails is named by its own seed, and
// `random_problems THAT_SEED 1` runs it alone.
#include <algorithm>

#include "drawing.h"
#include "fastbptt/random.h"
#include "fastbptt/readout.h"
#include "reference/reference.h"

// Fresh memory is full of NaN, the library's own scratch too.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "max_malloc_fill_size=1073741824:malloc_fill_byte=255:detect_stack_use_after_return=1";
}

namespace fastbptt::tests {
namespace {

using Vector = std::vector<double>;

// More would make the reference the longest part of the run.
constexpr double most_flops = 6e6;

// Within this a rounding error may decide whether an error passes a relu.
constexpr double relu_margin = 1e-5;

constexpr double bfloat16_unit = 1.0 / 256;

struct Options {
  StackShape shape;
  Index T, B;
  bool bias, initial, grad_y, grad_final, grad_x;
  bool resets, mask, seeded, cells, grad_cells;
  std::uint64_t seed;
  Index begin;
  int threads;
  Layout x, y, dy, dx;
  Index offset;
};

Index draw_size(Random& random) {
  const Index around[] = {8, 16, 32, 64, 128};
  if (random.chance(0.3))
    return std::max<Index>(1, around[random.between(0, 4)] + random.between(-1, 1));
  if (random.chance(0.05)) return random.between(130, 700);
  return random.between(1, random.chance(0.3) ? 80 : 20);
}

double flops(const StackShape& s) {
  return 2.0 * gates(s.cell) * s.hidden_size *
         double(s.input_size + (2 * s.num_layers - 1) * s.output_size());
}

Options draw_options(Random& random) {
  Options o{};
  o.shape.cell = static_cast<Cell>(random.between(0, 5));
  o.shape.num_layers = random.chance(0.6) ? 1 : random.between(2, 3);
  // So few rows of so wide layers that threads share each step.
  const bool shared_steps = random.chance(0.2);
  const auto draw = [&] { return shared_steps ? random.between(40, 150) : draw_size(random); };
  o.shape.input_size = draw();
  do o.shape.hidden_size = draw();
  while (flops(o.shape) > most_flops);
  if (has_cell_state(o.shape.cell) && o.shape.hidden_size > 1 && random.chance(0.4)) {
    o.shape.proj_size = random.between(1, o.shape.hidden_size - 1);
  }
  // Two normalised values depend on nothing but their order, and the product with one input on its
  // sign, up to a part that rounding hides.
  if (std::min(o.shape.input_size, o.shape.hidden_size) > 4 &&
      (has_cell_state(o.shape.cell) || o.shape.cell == Cell::gru)) {
    o.shape.options.layer_norm = random.chance(0.3);
  }
  const auto layout = [&] { return static_cast<Layout>(random.between(0, 3)); };
  o.bias = random.chance(0.8);
  o.initial = random.chance(0.7);
  o.grad_y = random.chance(0.8);
  o.grad_final = random.chance(0.7);
  o.grad_x = random.chance(0.7);
  o.threads = static_cast<int>(random.between(1, 3));
  o.x = layout(), o.y = layout(), o.dy = layout(), o.dx = layout();
  o.offset = random.between(0, 1);
  if (random.chance(0.5)) {
    const auto rate = [&] { return random.chance(0.3) ? random.between(1, 10) * 0.1 : 0.0; };
    o.resets = random.chance(0.4), o.mask = random.chance(0.4);
    o.shape.options.recurrent_dropout = rate();
    o.shape.options.zoneout_h = rate();
    if (has_cell_state(o.shape.cell)) {
      o.shape.options.zoneout_c = rate();
      o.shape.options.peephole = random.chance(0.4);
      o.cells = random.chance(0.4), o.grad_cells = random.chance(0.4);
    }
    o.seeded = random.chance(0.8);
    o.seed = static_cast<std::uint64_t>(random.between(0, 1000)) << 30;
    o.begin = random.between(0, 50);
  }

  double most_rows = most_flops / flops(o.shape);
  // Of more sums one or another is always near the kink.
  if (o.shape.cell == Cell::rnn_relu) {
    most_rows = std::min(most_rows, 3e4 / double(o.shape.num_layers * o.shape.hidden_size));
  }
  o.B = random.chance(0.7) || shared_steps ? random.between(1, 9) : random.between(1, 40);
  o.T = random.chance(0.05)  ? 0
        : random.chance(0.7) ? random.between(1, 9)
                             : random.between(1, 400);
  o.B = std::min(o.B, static_cast<Index>(most_rows));
  o.T = std::min(o.T, static_cast<Index>(most_rows) / o.B);
  return o;
}

std::string text_of(const Options& o, const char* type) {
  char text[500];
  std::snprintf(
      text, sizeof text,
      "%s %s T=%td B=%td I=%td H=%td P=%td L=%td bias=%d initial=%d grad_y=%d grad_final=%d "
      "grad_x=%d threads=%d layouts x=%d y=%d dy=%d dx=%d offset=%td resets=%d mask=%d "
      "recurrent_dropout=%g zoneout=%g,%g peephole=%d layer_norm=%d narrow_tape=%d seeded=%d "
      "cells=%d,%d "
      "begin=%td",
      name_of(o.shape.cell), type, o.T, o.B, o.shape.input_size, o.shape.hidden_size,
      o.shape.proj_size, o.shape.num_layers, o.bias, o.initial, o.grad_y, o.grad_final, o.grad_x,
      o.threads, int(o.x), int(o.y), int(o.dy), int(o.dx), o.offset, o.resets, o.mask,
      o.shape.options.recurrent_dropout, o.shape.options.zoneout_h, o.shape.options.zoneout_c,
      o.shape.options.peephole, o.shape.options.layer_norm, o.shape.options.narrow_tape, o.seeded,
      o.cells, o.grad_cells, o.begin);
  return text;
}

// Says where a result is wrong, and counts it.
class Verdict {
 public:
  // The largest error against the largest magnitude. Gradients may vanish on their way back: next
  // to the numbers of size 1 that they come from, `nothing` is nothing.
  void close(const std::string& name, const Vector& got, const Vector& want, double tolerance) {
    double error = 0, size = 0;
    if (got.size() != want.size()) return fail(name, "sizes differ");
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double e = std::abs(got[i] - want[i]);
      if (!(e <= error)) error = e;  // a NaN stays
      if (std::isnan(error)) break;
      size = std::max(size, std::abs(want[i]));
    }
    constexpr double nothing = 1e-10;
    const double allowed = size > 0 ? tolerance * std::max(size, nothing) : 0;
    if (error <= allowed) return;
    char text[100];
    std::snprintf(text, sizeof text, "error %.3g, allowed %.3g", error, allowed);
    fail(name, text);
  }
  void require(bool right, const std::string& name, const std::string& what) {
    if (!right) fail(name, what);
  }
  bool failed() const { return failed_; }

 private:
  void fail(const std::string& name, const std::string& what) {
    std::fprintf(stderr, "  %s: %s\n", name.c_str(), what.c_str());
    failed_ = true;
  }
  bool failed_ = false;
};

// Roundings that add up independently over the longest sum, with room for activations some units
// off.
template <class S>
double tolerance(Index longest) {
  return 32.0 * std::numeric_limits<S>::epsilon() * std::sqrt(double(longest));
}

const double* pointer(const Vector& values) { return values.empty() ? nullptr : values.data(); }

Vector slice(const Vector& all, Index l, Index n) {
  return all.empty() ? Vector() : Vector(all.begin() + l * n, all.begin() + (l + 1) * n);
}

void append(Vector& to, const Vector& more) { to.insert(to.end(), more.begin(), more.end()); }

bool stop_at_once(void*) { return true; }

// A stack of layers and all that its verbs take.
template <class S>
class StackProblem {
 public:
  StackProblem(Random& random, const Options& o)
      : o_(o),
        x_(o.x, o.T, o.B, o.shape.input_size, o.offset),
        dy_(o.dy, o.T, o.B, o.shape.output_size(), o.offset),
        initial_(o.shape, o.B, o.offset),
        grad_final_(o.shape, o.B, o.offset),
        grad_cells_(o.dy, o.T, o.B, o.shape.hidden_size, o.offset),
        resets_(o.resets ? Array<bool>(o.T * o.B, o.offset) : Array<bool>()),
        mask_(o.mask ? Array<bool>(o.T * o.B, o.offset) : Array<bool>()),
        weights_(o.shape, o.bias, o.offset) {
    do draw(random);
    while (o.shape.cell == Cell::rnn_relu && near_the_kink());
  }

  void check(Verdict& verdict, bool interrupt) {
    const Index L = o_.shape.num_layers, H = o_.shape.hidden_size;
    // A normalised value and its gradient are what is left of larger ones, a unit as wide as
    // theirs.
    const double allowed = (o_.shape.options.layer_norm ? 4 : 1) *
                           tolerance<S>(L * (o_.shape.input_size + H) + o_.T * o_.B);
    const Expected want = expected();
    const auto weights = weights_.template views<const S>();
    const SequenceArray<S> y(o_.y, o_.T, o_.B, o_.shape.output_size(), o_.offset);
    const StateArrays<S> final(o_.shape, o_.B, o_.offset);
    Forward<S> run{o_.T, input(), {}, y.view(), final.view()};
    run.begin = o_.begin;
    const SequenceArray<S> cells(o_.y, o_.T, o_.B, H, o_.offset);
    if (o_.cells) run.cells = cells.view();
    const auto session_with = [&](const std::uint64_t* seed) {
      Batch batch{o_.begin + o_.T, o_.B};
      batch.seed = seed;
      batch.begin = o_.begin;
      batch.resets = resets_.data();
      batch.mask = mask_.data();
      return std::make_unique<Session<S>>(o_.shape, weights.data(), batch, o_.T);
    };
    const auto session = [&] { return session_with(o_.seeded ? &o_.seed : nullptr); };
    if (o_.initial) run.initial = initial_.const_view();

    const auto check_forward = [&](const std::string& verb) {
      verdict.close(verb + " y", y.doubles(), want.y, allowed);
      verdict.require(y.gaps_untouched(), verb + " y", "written between the rows");
      verdict.close(verb + " h", final.h.doubles(), want.h, allowed);
      if (final.c.data()) verdict.close(verb + " c", final.c.doubles(), want.c, allowed);
      if (o_.cells) {
        verdict.close(verb + " cells", cells.doubles(), want.cells, allowed);
        verdict.require(cells.gaps_untouched(), verb + " cells", "written between the rows");
      }
    };
    session()->advance(run);
    check_forward("advance");

    y.array().fill(nan<S>);
    final.h.fill(nan<S>);
    cells.array().fill(nan<S>);
    if (final.c.data()) final.c.fill(nan<S>);
    const Array<S> tape(tape_size(o_.shape, o_.T, o_.B), o_.offset);
    session()->record(run, tape.data());
    check_forward("record");
    // The gradient of an expectation is of no use to a training.
    if (!o_.seeded && o_.shape.options.zoneout_h + o_.shape.options.zoneout_c > 0) return;

    // The roundings of a narrow tape are larger than any of the arithmetic.
    const double near =
        o_.shape.options.narrow_tape ? std::max(allowed, 4 * bfloat16_unit) : allowed;
    const SequenceArray<S> grad_x(o_.dx, o_.T, o_.B, o_.shape.input_size, o_.offset);
    const StateArrays<S> grad_initial(o_.shape, o_.B, o_.offset);
    const WeightArrays<S> grads(o_.shape, o_.bias, o_.offset);
    for (const Array<S>& grad : grads.arrays) grad.fill(S(0.5));
    const auto grad_views = grads.views();
    Reverse<S> grad{};
    grad.tape = tape.data();
    if (o_.grad_y) grad.grad_y = dy_.const_view();
    if (o_.grad_final) grad.grad_final = grad_final_.const_view();
    if (o_.grad_x) grad.grad_x = grad_x.view();
    grad.grad_initial = grad_initial.view();
    if (o_.grad_cells) grad.grad_cells = grad_cells_.const_view();
    run.final = {};
    auto back = session();
    back->reverse(run, grad);
    const bool add = o_.shape.input_size % 2 == 0;
    back->finish(grad_views.data(), add);
    if (o_.grad_x) {
      verdict.close("grad_x", grad_x.doubles(), want.grad_x, near);
      verdict.require(grad_x.gaps_untouched(), "grad_x", "written between the rows");
    }
    verdict.close("grad_h", grad_initial.h.doubles(), want.grad_h, near);
    if (grad_initial.c.data()) {
      verdict.close("grad_c", grad_initial.c.doubles(), want.grad_c, near);
    }
    const char* const kinds[] = {"w_ih", "w_hh",     "b_ih",    "b_hh",    "w_hr",   "h0",
                                 "c0",   "peephole", "gain_ih", "gain_hh", "gain_c", "shift_c"};
    for (std::size_t i = 0; i < grads.arrays.size(); ++i) {
      if (!grads.arrays[i].data()) continue;
      Vector sum = want.grads[i];
      for (double& value : sum) value += add ? 0.5 : 0.0;
      verdict.close("grad_" + std::string(kinds[i % weights_a_layer]) + " of layer " +
                        std::to_string(i / weights_a_layer),
                    grads.arrays[i].doubles(), sum, near);
    }

    if (!interrupt) return;
    run.final = final.view();
    const auto stopped = [&](const char* verb, auto&& call) {
      bool thrown = false;
      try {
        call();
      } catch (const Interrupted&) {
        thrown = true;
      }
      verdict.require(thrown == (o_.T > 0), verb, "a poll that says stop was not heeded");
    };
    stopped("advance", [&] { session()->advance(run, {stop_at_once, nullptr}); });
    stopped("record", [&] { session()->record(run, tape.data(), {stop_at_once, nullptr}); });
    stopped("reverse", [&] { session()->reverse(run, grad, {stop_at_once, nullptr}); });
  }

 private:
  struct Expected {
    Vector y, h, c, cells, grad_x, grad_h, grad_c;
    std::vector<Vector> grads;  // in the order of WeightArrays
  };

  Sequence<const S> input() const { return o_.T > 0 ? x_.const_view() : Sequence<const S>{}; }

  void draw(Random& random) {
    const auto normal = [&] { return random.normal(); };
    // Saturated units would turn a rounding error into any relative error of their slope.
    const double bound =
        1.0 / std::sqrt(double(std::max(o_.shape.input_size, o_.shape.hidden_size)));
    x_.for_each([&](S& value) { value = S(normal()); });
    dy_.for_each([&](S& value) { value = S(normal()); });
    grad_cells_.for_each([&](S& value) { value = S(normal()); });
    const double often = random.chance(0.5) ? 0.5 : 0.1;
    resets_.draw([&] { return random.chance(often); });
    mask_.draw([&] { return !random.chance(often); });
    // What is missing may hold anything.
    for (Index row = 0; row < o_.T * o_.B && o_.mask; ++row) {
      S* const x = x_.view().at(row / o_.B, row % o_.B);
      if (!mask_[row]) std::fill(x, x + o_.shape.input_size, nan<S>);
    }
    for (const StateArrays<S>* state : {&initial_, &grad_final_}) {
      state->h.draw(normal);
      state->c.draw(normal);
    }
    for (const Array<S>& weight : weights_.arrays)
      weight.draw([&] { return random.uniform(bound); });
  }

  reference::Problem layer_problem(Index l, const Vector& x) {
    const Index H = o_.shape.hidden_size, n_h = o_.B * o_.shape.output_size(), n_c = o_.B * H;
    reference::Problem p{};
    p.cell = static_cast<reference::Cell>(o_.shape.cell);
    p.T = o_.T, p.B = o_.B, p.I = o_.shape.layer(l).input_size, p.H = H;
    p.x = x.data();
    kept_.clear();
    const auto keep = [this](Vector values) {
      kept_.push_back(std::make_unique<Vector>(std::move(values)));
      return pointer(*kept_.back());
    };
    if (o_.initial) {
      p.h0 = keep(slice(initial_.h.doubles(), l, n_h));
      p.c0 = keep(slice(initial_.c.doubles(), l, n_c));
    }
    if (o_.grad_final) {
      p.grad_h = keep(slice(grad_final_.h.doubles(), l, n_h));
      p.grad_c = keep(slice(grad_final_.c.doubles(), l, n_c));
    }
    const Array<S>* w = &weights_.arrays[weights_a_layer * l];
    p.w_ih = keep(w[0].doubles()), p.w_hh = keep(w[1].doubles());
    p.b_ih = keep(w[2].doubles()), p.b_hh = keep(w[3].doubles());
    p.peephole = keep(w[7].doubles());
    p.gain_ih = keep(w[8].doubles()), p.gain_hh = keep(w[9].doubles());
    p.gain_c = keep(w[10].doubles()), p.shift_c = keep(w[11].doubles());
    p.P = o_.shape.proj_size, p.w_hr = keep(w[4].doubles());
    p.resets = resets_.data();
    p.mask = mask_.data();
    if (o_.grad_cells && l == o_.shape.num_layers - 1) p.grad_cells = keep(grad_cells_.doubles());
    const auto drawn = [&](Draw draw, double kept, S value, Index t, Index b) {
      Vector row(draw == Draw::zoneout_c ? H : o_.shape.output_size());
      const Index step = draw == Draw::recurrent_dropout ? 0 : o_.begin + t;
      draw_mask(o_.seed, {draw, l, step, b}, 1 - kept, double(value), Index(row.size()),
                row.data());
      return row;
    };
    const LayerOptions& options = o_.shape.options;
    const double drop = options.recurrent_dropout;
    if (o_.seeded && drop > 0) {
      Vector mask;
      for (Index b = 0; b < o_.B; ++b) {
        append(mask,
               drawn(Draw::recurrent_dropout, 1 - drop, S(drop < 1 ? 1 / (1 - drop) : 0), 0, b));
      }
      p.recurrent_mask = keep(mask);
    }
    const auto kept = [&](Draw draw, double rate) -> const double* {
      if (rate == 0) return nullptr;
      Vector all;
      for (Index row = 0; row < o_.T * o_.B; ++row) {
        append(all, o_.seeded ? drawn(draw, rate, S(1), row / o_.B, row % o_.B)
                              : Vector(draw == Draw::zoneout_c ? H : o_.shape.output_size(),
                                       double(S(rate))));
      }
      return keep(all);
    };
    p.keep_h = kept(Draw::zoneout_h, options.zoneout_h);
    p.keep_c = kept(Draw::zoneout_c, options.zoneout_c);
    return p;
  }

  Expected expected() {
    const Index L = o_.shape.num_layers;
    std::vector<Vector> inputs{x_.doubles()};
    std::vector<reference::Result> results;
    for (Index l = 0; l + 1 < L; ++l)
      inputs.push_back(reference::run(layer_problem(l, inputs[l])).y);
    Vector grad_y = o_.grad_y ? dy_.doubles() : Vector();
    for (Index l = L - 1; l >= 0; --l) {
      reference::Problem p = layer_problem(l, inputs[l]);
      p.grad_y = pointer(grad_y);
      results.insert(results.begin(), reference::run(p));
      grad_y = results.front().grad_x;
    }
    const Vector none;  // of the learned states, which no problem has
    Expected want;
    want.y = results.back().y;
    want.cells = results.back().cells;
    want.grad_x = grad_y;
    for (const reference::Result& r : results) {
      append(want.h, r.h);
      append(want.c, r.c);
      append(want.grad_h, r.grad_h0);
      append(want.grad_c, r.grad_c0);
      for (const Vector* grad :
           {&r.grad_w_ih, &r.grad_w_hh, &r.grad_b_ih, &r.grad_b_hh, &r.grad_w_hr, &none, &none,
            &r.grad_peephole, &r.grad_gain_ih, &r.grad_gain_hh, &r.grad_gain_c, &r.grad_shift_c}) {
        want.grads.push_back(*grad);
      }
    }
    return want;
  }

  // Whether any sum that goes into a relu is too near to zero.
  bool near_the_kink() {
    Vector x = x_.doubles();
    for (Index l = 0; l < o_.shape.num_layers; ++l) {
      const reference::Result result = reference::run(layer_problem(l, x));
      if (result.kink < relu_margin) return true;
      x = result.y;
    }
    return false;
  }

  const Options o_;
  SequenceArray<S> x_;
  SequenceArray<S> dy_;
  StateArrays<S> initial_;
  StateArrays<S> grad_final_;
  SequenceArray<S> grad_cells_;
  Array<bool> resets_;
  Array<bool> mask_;
  WeightArrays<S> weights_;
  std::vector<std::unique_ptr<Vector>> kept_;  // what the reference's problem points at
};

template <class S>
void check_stack(Random& random, Verdict& verdict, std::string& text) {
  Options options = draw_options(random);
  options.shape.options.narrow_tape =
      std::is_same_v<S, float> && !options.shape.options.layer_norm && random.chance(0.2);
  text = text_of(options, sizeof(S) == 4 ? "float32" : "float64");
  set_num_threads(options.threads);
  StackProblem<S>(random, options).check(verdict, random.chance(0.1));
}

// linear, linear_backward, readout_loss and embedding_backward over the same rows.
template <class S>
void check_readout(Random& random, Verdict& verdict, std::string& text) {
  const Index K = draw_size(random), N = draw_size(random);
  const double most = most_flops / (2.0 * double(K) * double(N));
  const Index rows = std::min<Index>(random.chance(0.05)  ? 0
                                     : random.chance(0.5) ? random.between(1, 9)
                                                          : random.between(1, 700),
                                     static_cast<Index>(std::max(1.0, most)));
  const bool bias = random.chance(0.7), weight = random.chance(0.8);
  const bool gradient = random.chance(0.8), classes = random.chance(0.5);
  const int threads = static_cast<int>(random.between(1, 3));
  const Index offset = random.between(0, 1);
  char line[200];
  std::snprintf(line, sizeof line,
                "readout %s rows=%td K=%td N=%td bias=%d weight=%d gradient=%d classes=%d "
                "threads=%d offset=%td",
                sizeof(S) == 4 ? "float32" : "float64", rows, K, N, bias, weight, gradient, classes,
                threads, offset);
  text = line;
  set_num_threads(threads);

  const auto drawn = [&](Index n, double scale) {
    Array<S> array(n, offset);
    array.draw([&] { return scale * random.normal(); });
    return array;
  };
  const Array<S> x = drawn(rows * K, 1), W = drawn(N * K, 1 / std::sqrt(double(K)));
  const Array<S> b = bias ? drawn(N, 1) : Array<S>();
  const Array<S> dy = drawn(rows * N, 1);
  const double allowed = tolerance<S>(K + N + rows);

  // grad_x = dy W, grad_weight = dy^T x + 0.5, grad_bias = sum of dy + 0.5
  struct Grads {
    Vector x, weight, bias;
  };
  const auto backward = [&](const Vector& d) {
    Grads g{Vector(rows * K), Vector(N * K, 0.5), Vector(bias ? N : 0, 0.5)};
    for (Index r = 0; r < rows; ++r) {
      for (Index n = 0; n < N; ++n) {
        for (Index k = 0; k < K; ++k) {
          g.x[r * K + k] += d[r * N + n] * double(W[n * K + k]);
          g.weight[n * K + k] += d[r * N + n] * double(x[r * K + k]);
        }
        if (bias) g.bias[n] += d[r * N + n];
      }
    }
    return g;
  };
  const Array<S> grad_x(rows * K, offset), grad_weight(N * K, offset);
  const Array<S> grad_bias = bias ? Array<S>(N, offset) : Array<S>();
  const auto begin = [&] {
    grad_x.fill(nan<S>);
    grad_weight.fill(S(0.5));
    grad_bias.fill(S(0.5));
  };
  const auto compare = [&](const std::string& call, const Vector& d) {
    const Grads want = backward(d);
    verdict.close(call + " grad_x", grad_x.doubles(), want.x, allowed);
    verdict.close(call + " grad_weight", grad_weight.doubles(), want.weight, allowed);
    verdict.close(call + " grad_bias", grad_bias.doubles(), want.bias, allowed);
  };

  const Linear<S> layer{rows, K, N, x.data(), W.data(), b.data()};
  Vector logits(rows * N);
  for (Index r = 0; r < rows; ++r) {
    for (Index n = 0; n < N; ++n) {
      double& sum = logits[r * N + n];
      if (bias) sum = double(b[n]);
      for (Index k = 0; k < K; ++k) sum += double(x[r * K + k]) * double(W[n * K + k]);
    }
  }
  const Array<S> y(rows * N, offset);
  for (const bool cuts : {false, true}) {
    linear(layer, y.data(), cuts);
    verdict.close("linear y", y.doubles(), logits, allowed);
  }
  begin();
  linear_backward(layer, dy.data(), grad_x.data(), grad_weight.data(), grad_bias.data());
  compare("linear_backward", dy.doubles());

  // Without a weight the prediction is dy, only to have one of the right size.
  const Vector prediction = weight ? logits : dy.doubles();
  constexpr std::int64_t ignored = -100;
  const Array<S> values = drawn(rows * N, 1);
  const Index counted = classes ? rows : 0;
  const std::unique_ptr<std::int64_t[]> targets(new std::int64_t[counted]);
  const double scale = 1.0 / double(rows + 1);
  double loss = 0;
  Vector d(rows * N);
  for (Index r = 0; r < rows; ++r) {
    const double* const row = prediction.data() + r * N;
    if (classes) {
      targets[r] = random.chance(0.1) ? ignored : random.between(0, N - 1);
      if (targets[r] == ignored) continue;
      const double largest = *std::max_element(row, row + N);
      double total = 0;
      for (Index n = 0; n < N; ++n) total += std::exp(row[n] - largest);
      loss += std::log(total) + largest - row[targets[r]];
      for (Index n = 0; n < N; ++n) {
        d[r * N + n] = scale * (std::exp(row[n] - largest) / total - (n == targets[r]));
      }
    } else {
      for (Index n = 0; n < N; ++n) {
        const double difference = row[n] - double(values[r * N + n]);
        loss += difference * difference;
        d[r * N + n] = 2 * scale * difference;
      }
    }
  }
  loss *= scale;

  const Array<S> grad_prediction(rows * N, offset);
  begin();
  ReadoutLoss<S> job{};
  job.readout = weight ? layer : Linear<S>{rows, N, N, dy.data(), nullptr, nullptr};
  job.loss = classes ? Loss::cross_entropy : Loss::mse;
  job.classes = targets.get();
  job.ignore_index = ignored;
  job.values = classes ? nullptr : values.data();
  job.scale = scale;
  if (gradient) {
    job.grad_x = weight ? grad_x.data() : grad_prediction.data();
    if (weight) job.grad_weight = grad_weight.data(), job.grad_bias = grad_bias.data();
  }
  const double got = readout_loss(job);
  // Where a class is as good as certain the loss is a small difference of numbers of size 1.
  verdict.require(std::abs(got - loss) <= allowed * std::max(1.0, loss), "readout_loss",
                  "got " + std::to_string(got) + ", wanted " + std::to_string(loss));
  if (gradient && weight) compare("readout_loss", d);
  if (gradient && !weight) {
    verdict.close("readout_loss grad_x", grad_prediction.doubles(), d, allowed);
  }

  const std::unique_ptr<std::int64_t[]> index(new std::int64_t[rows]);
  const Array<S> grad = drawn(rows * K, 1);
  Vector rows_of_grad(N * K, 0.5);
  for (Index r = 0; r < rows; ++r) {
    index[r] = random.between(0, N - 1);
    for (Index k = 0; k < K; ++k) rows_of_grad[index[r] * K + k] += double(grad[r * K + k]);
  }
  grad_weight.fill(S(0.5));
  embedding_backward(rows, K, index.get(), grad.data(), grad_weight.data());
  verdict.close("embedding_backward", grad_weight.doubles(), rows_of_grad, allowed);
}

int run(unsigned long seed, unsigned long count) {
  const std::string isa = isa_or_exit();
  unsigned long failed = 0;
  for (unsigned long i = 0; i < count; ++i) {
    Random random(seed + i);
    Verdict verdict;
    std::string text;
    const auto check = random.chance(0.2)
                           ? (random.chance(0.5) ? check_readout<float> : check_readout<double>)
                           : (random.chance(0.5) ? check_stack<float> : check_stack<double>);
    check(random, verdict, text);
    if (!verdict.failed()) continue;
    std::fprintf(stderr, "seed %lu, %s: %s\n", seed + i, isa.c_str(), text.c_str());
    ++failed;
  }
  std::printf("%s: %lu problems, %lu wrong\n", isa.c_str(), count, failed);
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace fastbptt::tests

int main(int argc, char** argv) {
  using fastbptt::tests::argument;
  return fastbptt::tests::run(argument(argc, argv, 1, 1), argument(argc, argv, 2, 300));
}
