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
  std::vector<Index> lengths;  // of all steps from the first of the session on; empty: all
  bool packed;
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
  const Index above = (s.num_layers - 1) * (s.directions + 1) * s.output_size();
  return 2.0 * gates(s.cell) * s.hidden_size * s.directions *
         double(s.input_size + s.output_size() + above);
}

Options draw_options(Random& random) {
  Options o{};
  o.shape.cell = static_cast<Cell>(random.between(0, 5));
  o.shape.num_layers = random.chance(0.6) ? 1 : random.between(2, 3);
  o.shape.directions = random.chance(0.7) ? 1 : 2;
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
  const auto rate = [&] { return random.chance(0.3) ? random.between(1, 10) * 0.1 : 0.0; };
  o.shape.dropout = rate();
  if (random.chance(0.5)) {
    o.resets = random.chance(0.4), o.mask = random.chance(0.4);
    // What more leaves of h' is so large that errors grow from step to step, or nothing.
    const double dropped = rate();
    o.shape.options.recurrent_dropout = dropped <= 0.6 ? dropped : 1.0;
    o.shape.options.zoneout_h = rate();
    if (has_cell_state(o.shape.cell)) {
      o.shape.options.zoneout_c = rate();
      o.shape.options.peephole = random.chance(0.4);
      o.cells = random.chance(0.4), o.grad_cells = random.chance(0.4);
    }
    // Two directions need all of time at once.
    if (o.shape.directions == 1) o.begin = random.between(0, 50);
  }
  o.seeded = random.chance(0.8);
  o.seed = static_cast<std::uint64_t>(random.between(0, 1000)) << 30;

  double most_rows = most_flops / flops(o.shape);
  // Of more sums one or another is always near the kink.
  if (o.shape.cell == Cell::rnn_relu) {
    most_rows = std::min(most_rows, 3e4 / double(o.shape.layers() * o.shape.hidden_size));
  }
  o.B = random.chance(0.7) || shared_steps ? random.between(1, 9) : random.between(1, 40);
  o.T = random.chance(0.05)  ? 0
        : random.chance(0.7) ? random.between(1, 9)
                             : random.between(1, 400);
  o.B = std::min(o.B, static_cast<Index>(most_rows));
  o.T = std::min(o.T, static_cast<Index>(most_rows) / o.B);
  if (random.chance(0.4)) {
    const Index all = o.begin + o.T;
    for (Index b = 0; b < o.B; ++b) {
      o.lengths.push_back(random.chance(0.2) ? all : random.between(0, all));
    }
    o.packed = o.begin == 0 && !o.resets && !o.mask && random.chance(0.5);
    if (o.packed) std::sort(o.lengths.rbegin(), o.lengths.rend());
  }
  return o;
}

std::string text_of(const Options& o, const char* type) {
  std::string lengths;
  for (const Index length : o.lengths) lengths += " " + std::to_string(length);
  char text[600];
  std::snprintf(
      text, sizeof text,
      "%s %s T=%td B=%td I=%td H=%td P=%td L=%td D=%td dropout=%g packed=%d bias=%d initial=%d "
      "grad_y=%d grad_final=%d "
      "grad_x=%d threads=%d layouts x=%d y=%d dy=%d dx=%d offset=%td resets=%d mask=%d "
      "recurrent_dropout=%g zoneout=%g,%g peephole=%d layer_norm=%d narrow_tape=%d precision=%d "
      "seeded=%d cells=%d,%d begin=%td",
      name_of(o.shape.cell), type, o.T, o.B, o.shape.input_size, o.shape.hidden_size,
      o.shape.proj_size, o.shape.num_layers, o.shape.directions, o.shape.dropout, o.packed, o.bias,
      o.initial, o.grad_y, o.grad_final, o.grad_x, o.threads, int(o.x), int(o.y), int(o.dy),
      int(o.dx), o.offset, o.resets, o.mask, o.shape.options.recurrent_dropout,
      o.shape.options.zoneout_h, o.shape.options.zoneout_c, o.shape.options.peephole,
      o.shape.options.layer_norm, o.shape.options.narrow_tape, int(o.shape.precision), o.seeded,
      o.cells, o.grad_cells, o.begin);
  return text + (lengths.empty() ? "" : " lengths=" + lengths.substr(1));
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

// The same where products are less precise than that: sixteen and eight bits, and what many steps
// make of them.
double unit_of(MatmulPrecision precision) {
  return precision == MatmulPrecision::medium ? 0.25
         : precision == MatmulPrecision::high ? 1e-3
                                              : 0;
}

const double* pointer(const Vector& values) { return values.empty() ? nullptr : values.data(); }

Vector slice(const Vector& all, Index l, Index n) {
  return all.empty() ? Vector() : Vector(all.begin() + l * n, all.begin() + (l + 1) * n);
}

// The numbers of columns [from, from + n) of each row; as many columns go into `to` at that place.
Vector columns(const Vector& all, Index width, Index from, Index n) {
  Vector some;
  for (Index row = 0; row < static_cast<Index>(all.size()) / width; ++row) {
    some.insert(some.end(), all.begin() + row * width + from, all.begin() + row * width + from + n);
  }
  return some;
}
void put_columns(Vector& to, Index width, Index from, const Vector& some, Index n) {
  for (Index row = 0; row < static_cast<Index>(some.size()) / n; ++row) {
    std::copy_n(some.begin() + row * n, n, to.begin() + row * width + from);
  }
}

// The rows in the opposite order, if they are to be.
Vector turned(Vector all, Index width, bool backward) {
  if (!backward) return all;
  Vector found;
  for (Index row = static_cast<Index>(all.size()) / width - 1; row >= 0; --row) {
    found.insert(found.end(), all.begin() + row * width, all.begin() + (row + 1) * width);
  }
  return found;
}

void add(Vector& to, const Vector& more) {
  to.resize(std::max(to.size(), more.size()));
  for (std::size_t i = 0; i < more.size(); ++i) to[i] += more[i];
}

Vector times(Vector all, const Vector& factors) {
  for (std::size_t i = 0; i < all.size(); ++i) all[i] *= factors[i];
  return all;
}

bool stop_at_once(void*) { return true; }

// A stack of layers and all that its verbs take.
template <class E>
class StackProblem {
  using S = Arithmetic<E>;
  static constexpr bool narrow = !std::is_same_v<E, S>;

 public:
  StackProblem(Random& random, const Options& o)
      : o_(o),
        x_(sequence<E>(o.x, o.shape.input_size)),
        dy_(sequence<S>(o.dy, y_width())),
        initial_(o.shape, o.B, o.offset),
        grad_final_(o.shape, o.B, o.offset),
        grad_cells_(sequence<S>(o.dy, c_width())),
        resets_(o.resets ? Array<bool>(o.T * o.B, o.offset) : Array<bool>()),
        mask_(o.mask ? Array<bool>(o.T * o.B, o.offset) : Array<bool>()),
        weights_(o.shape, o.bias, o.offset) {
    do draw(random);
    while (o.shape.cell == Cell::rnn_relu && near_the_kink());
  }

  void check(Verdict& verdict, bool interrupt) {
    // A normalised value and its gradient are what is left of larger ones, a unit as wide as
    // theirs.
    const double allowed = std::max(
        // What is rounded to bfloat16 from step to step is as rough as products of it.
        unit_of(narrow ? MatmulPrecision::medium : o_.shape.precision),
        (o_.shape.options.layer_norm ? 4 : 1) *
            tolerance<S>(o_.shape.num_layers * (o_.shape.input_size + c_width()) + o_.T * o_.B));
    const Expected want = expected();
    const auto weights = weights_.template views<const E>();
    const SequenceArray<E> y = sequence<E>(o_.y, y_width());
    const StateArrays<S> final(o_.shape, o_.B, o_.offset);
    Forward<E> run{o_.T, input(), {}, y.view(), final.view()};
    run.begin = o_.begin;
    const SequenceArray<S> cells = sequence<S>(o_.y, c_width());
    if (o_.cells) run.cells = cells.view();
    const auto session_with = [&](const std::uint64_t* seed) {
      Batch batch{o_.begin + o_.T, o_.B};
      batch.seed = seed;
      batch.begin = o_.begin;
      batch.resets = resets_.data();
      batch.mask = mask_.data();
      if (!o_.lengths.empty()) batch.lengths = o_.lengths.data();
      batch.packed = o_.packed;
      return std::make_unique<Session<E>>(o_.shape, weights.data(), batch, o_.T);
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

    y.array().fill(nan<E>);
    final.h.fill(nan<S>);
    cells.array().fill(nan<S>);
    if (final.c.data()) final.c.fill(nan<S>);
    const Array<S> tape(session()->tape_size(o_.begin, o_.T), o_.offset);
    session()->record(run, tape.data());
    check_forward("record");
    // The gradient of an expectation is of no use to a training.
    if (!o_.seeded && o_.shape.options.zoneout_h + o_.shape.options.zoneout_c > 0) return;

    // The roundings of a narrow tape are larger than any of the arithmetic.
    const double near =
        o_.shape.options.narrow_tape ? std::max(allowed, 4 * bfloat16_unit) : allowed;
    const SequenceArray<S> grad_x = sequence<S>(o_.dx, o_.shape.input_size);
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
    bool any_step = false;
    for (Index b = 0; b < o_.B; ++b) any_step |= steps(b) > 0;
    const auto stopped = [&](const char* verb, auto&& call) {
      bool thrown = false;
      try {
        call();
      } catch (const Interrupted&) {
        thrown = true;
      }
      verdict.require(thrown == any_step, verb, "a poll that says stop was not heeded");
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

  Index y_width() const { return o_.shape.directions * o_.shape.output_size(); }
  Index c_width() const { return o_.shape.directions * o_.shape.hidden_size; }

  // The steps of this run that a row has.
  Index steps(Index b) const {
    if (o_.lengths.empty()) return o_.T;
    return std::clamp<Index>(o_.lengths[b] - o_.begin, 0, o_.T);
  }
  // Which row of a sequence array a step of a row is.
  Index place(Index t, Index b) const {
    if (!o_.packed) return t * o_.B + b;
    Index before = 0;
    for (const Index length : o_.lengths) before += std::min(length, t);
    return before + b;
  }
  Index rows() const { return o_.packed ? place(o_.T, 0) : o_.T * o_.B; }

  template <class V>
  SequenceArray<V> sequence(Layout layout, Index width) const {
    return o_.packed ? SequenceArray<V>(layout, rows() > 0, rows(), width, o_.offset)
                     : SequenceArray<V>(layout, o_.T, o_.B, width, o_.offset);
  }
  // The steps of one row.
  template <class V>
  Vector row_of(const SequenceArray<V>& all, Index width, Index b) const {
    const Vector values = all.doubles();
    Vector row;
    for (Index t = 0; t < steps(b); ++t) {
      const auto first = values.begin() + place(t, b) * width;
      row.insert(row.end(), first, first + width);
    }
    return row;
  }
  void put_row(Vector& to, Index width, Index b, const Vector& row) const {
    to.resize(rows() * width);
    for (Index t = 0; t < steps(b); ++t) {
      std::copy_n(row.begin() + t * width, width, to.begin() + place(t, b) * width);
    }
  }

  Sequence<const E> input() const { return rows() > 0 ? x_.const_view() : Sequence<const E>{}; }

  void draw(Random& random) {
    const auto normal = [&] { return random.normal(); };
    // Saturated units would turn a rounding error into any relative error of their slope.
    const double bound =
        1.0 / std::sqrt(double(std::max(o_.shape.input_size, o_.shape.hidden_size)));
    x_.for_each([&](E& value) { value = nearest<E>(normal()); });
    dy_.for_each([&](S& value) { value = S(normal()); });
    grad_cells_.for_each([&](S& value) { value = S(normal()); });
    const double often = random.chance(0.5) ? 0.5 : 0.1;
    resets_.draw([&] { return random.chance(often); });
    mask_.draw([&] { return !random.chance(often); });
    // What is missing may hold anything.
    const auto lose = [](const auto& all, Index t, Index b, Index width) {
      auto* const first = all.view().at(t, b);
      std::fill_n(first, width, nan<std::decay_t<decltype(*first)>>);
    };
    for (Index t = 0; t < o_.T && !o_.packed; ++t) {
      for (Index b = 0; b < o_.B; ++b) {
        const bool behind = t >= steps(b);
        if (behind || (o_.mask && !mask_[t * o_.B + b])) lose(x_, t, b, o_.shape.input_size);
        if (behind) lose(dy_, t, b, y_width());
        if (behind) lose(grad_cells_, t, b, c_width());
      }
    }
    initial_.h.draw([&] { return number(nearest<E>(normal())); });
    grad_final_.h.draw(normal);
    initial_.c.draw(normal);
    grad_final_.c.draw(normal);
    for (const Array<E>& weight : weights_.arrays)
      weight.draw([&] { return random.uniform(bound); });
  }

  // A row alone, in layer k, which is one direction of one layer: the reference goes forward only,
  // so a direction that runs backward gets its steps in the opposite order.
  reference::Problem row_problem(Index k, Index b, const Vector& x) {
    const Index n = steps(b), H = o_.shape.hidden_size, R = o_.shape.output_size();
    const bool backward = k % o_.shape.directions == 1;
    reference::Problem p{};
    p.cell = static_cast<reference::Cell>(o_.shape.cell);
    p.T = n, p.B = 1, p.I = o_.shape.layer(k).input_size, p.H = H;
    kept_.clear();
    flags_.clear();
    const auto keep = [this](Vector values) {
      kept_.push_back(std::make_unique<Vector>(std::move(values)));
      return pointer(*kept_.back());
    };
    p.x = keep(turned(x, p.I, backward));
    const auto state = [&](const Array<S>& all, Index width) {
      return keep(slice(all.doubles(), k * o_.B + b, width));
    };
    if (o_.initial) p.h0 = state(initial_.h, R), p.c0 = state(initial_.c, H);
    if (o_.grad_final) p.grad_h = state(grad_final_.h, R), p.grad_c = state(grad_final_.c, H);
    const Array<E>* w = &weights_.arrays[weights_a_layer * k];
    p.w_ih = keep(w[0].doubles()), p.w_hh = keep(w[1].doubles());
    p.b_ih = keep(w[2].doubles()), p.b_hh = keep(w[3].doubles());
    p.peephole = keep(w[7].doubles());
    p.gain_ih = keep(w[8].doubles()), p.gain_hh = keep(w[9].doubles());
    p.gain_c = keep(w[10].doubles()), p.shift_c = keep(w[11].doubles());
    p.P = o_.shape.proj_size, p.w_hr = keep(w[4].doubles());
    const auto flags = [&](const Array<bool>& all, Index later) -> const bool* {
      if (!all.data()) return nullptr;
      flags_.push_back(std::make_unique<bool[]>(n));
      for (Index t = 0; t + later < n; ++t) {
        flags_.back()[backward ? n - 1 - t : t] = all[(t + later) * o_.B + b];
      }
      return flags_.back().get();
    };
    p.resets = flags(resets_, backward);  // the same steps are kept apart
    p.mask = flags(mask_, 0);

    const LayerOptions& options = o_.shape.options;
    const double drop = options.recurrent_dropout;
    if (o_.seeded && drop > 0) {
      const S scale = S(drop < 1 ? 1 / (1 - drop) : 0);
      p.recurrent_mask = keep(drawn({Draw::recurrent_dropout, k, 0, b}, drop, scale, R));
    }
    const auto kept = [&](Draw draw, double rate) -> const double* {
      if (rate == 0) return nullptr;
      const Index width = draw == Draw::zoneout_c ? H : R;
      return keep(turned(o_.seeded ? drawn_steps({draw, k, 0, b}, 1 - rate, S(1), width)
                                   : Vector(n * width, double(S(rate))),
                         width, backward));
    };
    p.keep_h = kept(Draw::zoneout_h, options.zoneout_h);
    p.keep_c = kept(Draw::zoneout_c, options.zoneout_c);
    return p;
  }

  Vector drawn(const Place& place, double drop, S scale, Index width) const {
    Vector mask(width);
    draw_mask(o_.seed, place, drop, double(scale), width, mask.data());
    return mask;
  }
  Vector drawn_steps(Place place, double drop, S scale, Index width) const {
    Vector all;
    for (Index t = 0; t < steps(place.row); ++t) {
      place.step = o_.begin + t;
      const Vector mask = drawn(place, drop, scale, width);
      all.insert(all.end(), mask.begin(), mask.end());
    }
    return all;
  }
  // What the output of a layer below the last is multiplied by.
  Vector dropout(Index l, Index b) const {
    const double p = o_.shape.dropout;
    if (!o_.seeded || p == 0) return Vector(steps(b) * y_width(), 1);
    return drawn_steps({Draw::dropout, l, 0, b}, p, S(p < 1 ? 1 / (1 - p) : 0), y_width());
  }

  // One layer of one row in all its directions.
  struct LayerResults {
    Vector y, cells, grad_x;
    std::vector<reference::Result> parts;
  };
  LayerResults run_layer(Index l, Index b, const Vector& x, const Vector& grad_y) {
    const Index D = o_.shape.directions, R = o_.shape.output_size(), H = o_.shape.hidden_size;
    LayerResults all{Vector(steps(b) * D * R), Vector(steps(b) * D * H), Vector(), {}};
    for (Index d = 0; d < D; ++d) {
      reference::Problem p = row_problem(l * D + d, b, x);
      const Vector grad_d = turned(columns(grad_y, D * R, d * R, R), R, d == 1);
      p.grad_y = pointer(grad_d);
      Vector grad_c;
      if (o_.grad_cells && l == o_.shape.num_layers - 1) {
        grad_c = turned(columns(row_of(grad_cells_, D * H, b), D * H, d * H, H), H, d == 1);
      }
      p.grad_cells = pointer(grad_c);
      reference::Result r = reference::run(p);
      put_columns(all.y, D * R, d * R, turned(r.y, R, d == 1), R);
      put_columns(all.cells, D * H, d * H, turned(r.cells, H, d == 1), H);
      add(all.grad_x, turned(r.grad_x, p.I, d == 1));
      all.parts.push_back(std::move(r));
    }
    return all;
  }

  Expected expected() {
    const Index L = o_.shape.num_layers, D = o_.shape.directions;
    const Index R = o_.shape.output_size(), H = o_.shape.hidden_size, I = o_.shape.input_size;
    Expected want;
    want.grads.resize(L * D * weights_a_layer);
    for (const auto& [state, width] :
         {std::pair{&want.h, R}, {&want.grad_h, R}, {&want.c, H}, {&want.grad_c, H}}) {
      state->resize(L * D * o_.B * width);
    }
    for (Index b = 0; b < o_.B; ++b) {
      std::vector<Vector> inputs{row_of(x_, I, b)};
      for (Index l = 0; l + 1 < L; ++l) {
        inputs.push_back(times(run_layer(l, b, inputs[l], {}).y, dropout(l, b)));
      }
      Vector grad = o_.grad_y ? row_of(dy_, y_width(), b) : Vector();
      for (Index l = L - 1; l >= 0; --l) {
        const LayerResults layer = run_layer(l, b, inputs[l], grad);
        if (l == L - 1) put_row(want.y, y_width(), b, layer.y);
        if (l == L - 1 && o_.cells) put_row(want.cells, c_width(), b, layer.cells);
        for (Index d = 0; d < D; ++d) {
          const reference::Result& r = layer.parts[d];
          const Index k = l * D + d, at = k * o_.B + b;
          std::copy(r.h.begin(), r.h.end(), want.h.begin() + at * R);
          std::copy(r.c.begin(), r.c.end(), want.c.begin() + at * H);
          std::copy(r.grad_h0.begin(), r.grad_h0.end(), want.grad_h.begin() + at * R);
          std::copy(r.grad_c0.begin(), r.grad_c0.end(), want.grad_c.begin() + at * H);
          const Vector none;  // of the learned states, which no problem has
          const Vector* const grads[] = {&r.grad_w_ih,    &r.grad_w_hh,     &r.grad_b_ih,
                                         &r.grad_b_hh,    &r.grad_w_hr,     &none,
                                         &none,           &r.grad_peephole, &r.grad_gain_ih,
                                         &r.grad_gain_hh, &r.grad_gain_c,   &r.grad_shift_c};
          static_assert(std::size(grads) == weights_a_layer);
          for (int i = 0; i < weights_a_layer; ++i) {
            add(want.grads[k * weights_a_layer + i], *grads[i]);
          }
        }
        grad = l > 0 ? times(layer.grad_x, dropout(l - 1, b)) : layer.grad_x;
      }
      put_row(want.grad_x, I, b, grad);
    }
    return want;
  }

  // Whether any sum that goes into a relu is too near to zero.
  bool near_the_kink() {
    for (Index b = 0; b < o_.B; ++b) {
      Vector x = row_of(x_, o_.shape.input_size, b);
      for (Index l = 0; l < o_.shape.num_layers; ++l) {
        const LayerResults layer = run_layer(l, b, x, {});
        for (const reference::Result& part : layer.parts) {
          if (part.kink < relu_margin) return true;
        }
        x = times(layer.y, dropout(l, b));
      }
    }
    return false;
  }

  const Options o_;
  SequenceArray<E> x_;
  SequenceArray<S> dy_;
  StateArrays<S> initial_;
  StateArrays<S> grad_final_;
  SequenceArray<S> grad_cells_;
  Array<bool> resets_;
  Array<bool> mask_;
  WeightArrays<E> weights_;
  // What the reference's problem points at.
  std::vector<std::unique_ptr<Vector>> kept_;
  std::vector<std::unique_ptr<bool[]>> flags_;
};

template <class E>
void check_stack(Random& random, Verdict& verdict, std::string& text) {
  using S = Arithmetic<E>;
  constexpr bool narrow = !std::is_same_v<E, S>;
  Options options = draw_options(random);
  if (narrow) {
    // An error may decide whether another passes a relu; and there is no normalisation.
    if (options.shape.cell == Cell::rnn_relu) options.shape.cell = Cell::rnn_tanh;
    options.shape.options.layer_norm = false;
  }
  options.shape.options.narrow_tape = std::is_same_v<S, float> &&
                                      !options.shape.options.layer_norm &&
                                      random.chance(narrow ? 0.8 : 0.2);
  if (std::is_same_v<S, float> && options.shape.cell != Cell::rnn_relu && random.chance(0.3)) {
    options.shape.precision = random.chance(0.5) ? MatmulPrecision::high : MatmulPrecision::medium;
  }
  text = text_of(options, narrow ? "bfloat16" : sizeof(S) == 4 ? "float32" : "float64");
  set_num_threads(options.threads);
  StackProblem<E>(random, options).check(verdict, random.chance(0.1));
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
  constexpr void (*stacks[])(Random&, Verdict&, std::string&) = {
      check_stack<float>, check_stack<double>, check_stack<Bfloat16>};
  for (unsigned long i = 0; i < count; ++i) {
    Random random(seed + i);
    Verdict verdict;
    std::string text;
    const auto check = random.chance(0.2)
                           ? (random.chance(0.5) ? check_readout<float> : check_readout<double>)
                           : stacks[random.between(0, 2)];
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
