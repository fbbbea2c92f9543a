// The three verbs: a stack of layers walked through time in chunks, shared out to the threads in
// one of two ways. Rows of the batch: each thread takes its rows through all of time, so there is
// no barrier; the weight gradients of the threads are added up at the end, always in the same
// order. Or, where the batch is too small for that, hidden units: the threads do each step
// together.
#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch/dispatch.h"
#include "fastbptt/buffer.h"
#include "fastbptt/recurrent.h"
#include "fastbptt/runtime.h"
#include "schedules/stop_flag.h"
#include "threads/pool.h"

namespace fastbptt {
namespace {

// Rows of time x batch in a chunk: enough for the products to be worth their set-up, few enough
// that what one layer writes is still in the cache when the next reads it.
constexpr Index chunk_rows = 256;

// Rows of time x batch up to which packing the weights costs more than it saves.
constexpr Index direct_rows = 8;

// Work between two looks for an interrupt: a few hundredths of a second on a slow core.
constexpr double chunk_flops = 5e8;

// Rows of the batch for each of `parts` threads; or, if team > 1, one part that they do together.
struct Split {
  Index B;
  int parts;
  int team;
  Index begin(int p) const { return B * p / parts; }
  Index rows(int p) const { return begin(p + 1) - begin(p); }
  Index most_rows() const { return (B + parts - 1) / parts; }
};

// Rows a thread below which the weights are read so often that it is better to share them out.
constexpr Index rows_a_thread = 4;

// Work a step and thread that is worth a barrier.
constexpr double flops_a_barrier = 5e4;

// Of all layers, one step and row.
double step_flops(const StackShape& s) {
  return 2.0 * gates(s.cell) * s.hidden_size *
         (s.input_size + s.hidden_size * (2.0 * s.num_layers - 1));
}

Split split_work(const StackShape& s, Index T, Index B) {
  const double threads = get_num_threads();
  const double worth = std::max(1.0, step_flops(s) * T * B / flops_a_thread);
  const double layer_step = step_flops(s) * B / s.num_layers;
  if (B < rows_a_thread * threads) {
    const int team = static_cast<int>(std::min({threads, worth, layer_step / flops_a_barrier}));
    // Members that took turns on a CPU would wait for each other at every step.
    const int fit = team >= 2 ? std::min(team, usable_cpus()) : 1;
    if (fit >= 2) return {B, 1, fit};
  }
  return {B, static_cast<int>(std::min({worth, double(B), threads})), 1};
}

// Calls body(part, team) for every part, or for every member of the team.
template <class F>
void run_split(const Split& split, F&& body) {
  if (split.team == 1) {
    return run_parts(split.parts, [&](int p) { body(p, Team{}); });
  }
  struct Meeting {
    Barrier barrier;
    std::atomic<int> size{0};
  } meeting;
  run_team(split.team, [&](int rank, int size) {
    meeting.size.store(size, std::memory_order_relaxed);
    const auto wait = [](void* data) {
      Meeting& m = *static_cast<Meeting*>(data);
      m.barrier.wait(m.size.load(std::memory_order_relaxed));
    };
    body(0, Team{rank, size, wait, &meeting});
  });
}

// Whether the work is to stop: one answer for all of a team.
bool asked_to_stop(StopFlag& stop, const Team& team) {
  if (team.size == 1) return stop.asked();
  if (team.rank == 0) stop.asked();
  team.wait();
  return stop.is_set();
}

Index chunk_steps(const StackShape& s, Index rows, Index T) {
  const double most = std::min({double(chunk_rows), chunk_flops / step_flops(s), double(T) * rows});
  return std::max<Index>(1, static_cast<Index>(most) / rows);
}

// Where the parts of a tape lie: each layer's own, then y of every layer but the last.
template <class S>
struct TapeLayout {
  StackShape shape;
  Index T;
  Index B;
  Index layer_size() const { return T * B * tape_width(shape.cell) * shape.hidden_size; }
  Index y_size() const { return T * B * shape.hidden_size; }
  Index size() const { return shape.num_layers * layer_size() + (shape.num_layers - 1) * y_size(); }
  Sequence<S> layer(S* tape, Index l) const {
    const Index width = tape_width(shape.cell) * shape.hidden_size;
    return {tape + l * layer_size(), B * width, width};
  }
  Sequence<S> y(S* tape, Index l) const {
    const Index H = shape.hidden_size;
    return {tape + shape.num_layers * layer_size() + l * y_size(), B * H, H};
  }
};

template <class S>
State<S> layer_state(State<S> all, Index l, Index B, Index H, Index b) {
  const Index offset = (l * B + b) * H;
  return {all.h ? all.h + offset : nullptr, all.c ? all.c + offset : nullptr};
}

template <class S>
void copy_state(const StackShape& s, Index B, State<const S> from, State<S> to) {
  const Index n = s.num_layers * B * s.hidden_size;
  const auto copy = [n](const S* source, S* target) {
    if (source)
      std::copy(source, source + n, target);
    else
      std::fill(target, target + n, S(0));
  };
  copy(from.h, to.h);
  if (has_cell_state(s.cell)) copy(from.c, to.c);
}

// One allocation cut into consecutive pieces, each aligned.
template <class S>
class Arena {
 public:
  Index reserve(Index n) {
    const Index at = size_;
    constexpr Index line = 64 / sizeof(S);
    size_ += (n + line - 1) / line * line;
    return at;
  }
  void allocate() { buffer_ = Buffer<S>(size_); }
  S* at(Index offset) const { return buffer_.data() + offset; }

 private:
  Index size_ = 0;
  Buffer<S> buffer_;
};

template <class S>
void forward(const Forward<S>& run, S* tape, Interrupt interrupt) {
  const StackShape& s = run.shape;
  const Index L = s.num_layers, T = run.T, B = run.B, H = s.hidden_size;
  copy_state(s, B, run.initial, run.final);
  if (T == 0) return;

  const LayerKernels<S>& kernel = kernels().layer<S>();
  const Split split = split_work(s, T, B);
  const Index steps = chunk_steps(s, split.most_rows(), T);
  const bool own_y = !tape && L > 1;
  const bool direct = T * B <= direct_rows;

  Arena<S> arena;
  std::vector<Index> packed(L), scratch(split.parts), middle(split.parts);
  Index most_scratch = 0;
  for (Index l = 0; l < L; ++l) {
    packed[l] = arena.reserve(direct ? 0 : kernel.forward_packed(s.layer(l)));
    most_scratch = std::max(
        most_scratch, kernel.forward_scratch(s.layer(l), steps, split.most_rows(), split.team));
  }
  const Index y_size = steps * split.most_rows() * H;
  for (int p = 0; p < split.parts; ++p) {
    scratch[p] = arena.reserve(most_scratch);
    if (own_y) middle[p] = arena.reserve(2 * y_size);
  }
  arena.allocate();
  for (Index l = 0; l < L && !direct; ++l) {
    kernel.forward_pack(s.layer(l), run.weights[l], arena.at(packed[l]));
  }

  const TapeLayout<S> layout{s, T, B};
  StopFlag stop(interrupt);
  run_split(split, [&](int p, const Team& team) {
    const Index b = split.begin(p), rows = split.rows(p);
    for (Index t = 0; t < T && !asked_to_stop(stop, team); t += steps) {
      const Index n = std::min(steps, T - t);
      Sequence<const S> x = run.x.from(t, b);
      for (Index l = 0; l < L; ++l) {
        Sequence<S> y;
        if (l == L - 1)
          y = run.y.from(t, b);
        else if (tape)
          y = layout.y(tape, l).from(t, b);
        else
          y = {arena.at(middle[p]) + (l % 2) * y_size, rows * H, H};
        kernel.forward({s.layer(l), n, rows, x, y,
                        tape ? layout.layer(tape, l).from(t, b) : Sequence<S>{},
                        layer_state(run.final, l, B, H, b), direct ? nullptr : arena.at(packed[l]),
                        run.weights[l], team, arena.at(scratch[p])});
        x = {y.data, y.step, y.row};
      }
    }
  });
  stop.raise();
}

}  // namespace

Index tape_size(const StackShape& shape, Index T, Index B) {
  return TapeLayout<float>{shape, T, B}.size();
}

template <class S>
void advance(const Forward<S>& run, Interrupt interrupt) {
  forward<S>(run, nullptr, interrupt);
}

template <class S>
void record(const Forward<S>& run, S* tape, Interrupt interrupt) {
  forward(run, tape, interrupt);
}

template <class S>
void reverse(const Forward<S>& run, const Reverse<S>& grad, Interrupt interrupt) {
  const StackShape& s = run.shape;
  const Index L = s.num_layers, T = run.T, B = run.B, H = s.hidden_size;
  copy_state(s, B, grad.grad_final, grad.grad_initial);
  if (T == 0) return;

  const LayerKernels<S>& kernel = kernels().layer<S>();
  const Split split = split_work(s, T, B);
  const Index steps = chunk_steps(s, split.most_rows(), T);

  Arena<S> arena;
  std::vector<Index> packed(L), scratch(split.parts * L), middle(split.parts);
  for (Index l = 0; l < L; ++l) packed[l] = arena.reserve(kernel.reverse_packed(s.layer(l)));
  const Index x_size = steps * split.most_rows() * H;
  for (int p = 0; p < split.parts; ++p) {
    for (Index l = 0; l < L; ++l) {
      scratch[p * L + l] =
          arena.reserve(kernel.reverse_scratch(s.layer(l), steps, split.most_rows(), split.team));
    }
    middle[p] = arena.reserve(L > 1 ? 2 * x_size : 0);
  }
  arena.allocate();
  for (Index l = 0; l < L; ++l) {
    kernel.reverse_pack(s.layer(l), run.weights[l], arena.at(packed[l]));
  }

  const TapeLayout<const S> layout{s, T, B};
  StopFlag stop(interrupt);
  run_split(split, [&](int p, const Team& team) {
    const Index b = split.begin(p), rows = split.rows(p);
    for (Index l = 0; l < L && team.rank == 0; ++l) {
      kernel.reverse_begin(s.layer(l), arena.at(scratch[p * L + l]));
    }
    for (Index end = T; end > 0 && !asked_to_stop(stop, team);) {
      const Index t = (end - 1) / steps * steps;
      Sequence<const S> grad_y = grad.grad_y.from(t, b);
      for (Index l = L - 1; l >= 0; --l) {
        const auto y_of = [&](Index k) {
          return k == L - 1 ? Sequence<const S>{run.y.data, run.y.step, run.y.row}
                            : layout.y(grad.tape, k);
        };
        Sequence<S> grad_x = grad.grad_x.from(t, b);
        if (l > 0) grad_x = {arena.at(middle[p]) + (l % 2) * x_size, rows * H, H};
        ReverseJob<S> job{};
        job.shape = s.layer(l);
        job.steps = end - t;
        job.batch = rows;
        job.first = t == 0;
        job.initial = layer_state(run.initial, l, B, H, b);
        job.x = l == 0 ? run.x.from(t, b) : y_of(l - 1).from(t, b);
        job.y = y_of(l).from(t, b);
        job.tape = layout.layer(grad.tape, l).from(t, b);
        job.grad_y = grad_y;
        job.grad_x = grad_x;
        job.grad_state = layer_state(grad.grad_initial, l, B, H, b);
        job.packed = arena.at(packed[l]);
        job.team = team;
        job.scratch = arena.at(scratch[p * L + l]);
        job.weights = grad.grad_weights[l].w_ih != nullptr;
        kernel.reverse(job);
        grad_y = {grad_x.data, grad_x.step, grad_x.row};
      }
      end = t;
    }
  });
  stop.raise();
  for (Index l = 0; l < L; ++l) {
    for (int p = 0; p < split.parts && grad.grad_weights[l].w_ih; ++p) {
      kernel.reverse_finish(s.layer(l), arena.at(scratch[p * L + l]), grad.grad_weights[l]);
    }
  }
}

#define FASTBPTT_INSTANTIATE(S)                              \
  template void advance<S>(const Forward<S>&, Interrupt);    \
  template void record<S>(const Forward<S>&, S*, Interrupt); \
  template void reverse<S>(const Forward<S>&, const Reverse<S>&, Interrupt);
FASTBPTT_INSTANTIATE(float)
FASTBPTT_INSTANTIATE(double)

}  // namespace fastbptt
