// The three verbs in a session: a stack of layers walked through time in chunks, shared out to the
// threads in one of two ways. Rows of the batch: each thread takes its rows through all of time, so
// there is no barrier; the weight gradients of the threads are added up at the end, always in the
// same order. Or, where the batch is too small for that, hidden units: the threads do each step
// together.
#include <algorithm>
#include <atomic>
#include <memory>
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
  Index size() const { return size_; }
  void allocate() { buffer_ = Buffer<S>(size_); }
  S* at(Index offset) const { return buffer_.data() + offset; }

 private:
  Index size_ = 0;
  Buffer<S> buffer_;
};

// The memory of the forward verbs. Offsets into the arena, by layer or by part.
template <class S>
struct ForwardMemory {
  Arena<S> arena;
  std::vector<Index> packed;
  std::vector<Index> scratch;
  std::vector<Index> middle;  // two runs of y between layers, for advance
};

// The memory of reverse; scratch by part and layer, with the weight gradients so far.
template <class S>
struct ReverseMemory {
  Arena<S> arena;
  std::vector<Index> packed;
  std::vector<Index> scratch;
  std::vector<Index> middle;  // two runs of dL/dx between layers
};

}  // namespace

template <class S>
struct Session<S>::Data {
  StackShape shape;
  std::vector<Weights<const S>> weights;
  Index B;
  Split split;
  Index chunk;  // steps of a chunk
  bool direct;
  std::unique_ptr<ForwardMemory<S>> forward_memory;
  std::unique_ptr<ReverseMemory<S>> reverse_memory;

  Data(const StackShape& s, const Weights<const S>* w, Index T, Index rows, Index longest)
      : shape(s),
        weights(w, w + s.num_layers),
        B(rows),
        split(split_work(s, T, rows)),
        chunk(chunk_steps(s, split.most_rows(), longest)),
        direct(T * rows <= direct_rows) {}

  static const LayerKernels<S>& kernel() { return kernels().layer<S>(); }
  Index between() const { return chunk * split.most_rows() * shape.hidden_size; }

  ForwardMemory<S> lay_out_forward() const {
    const Index L = shape.num_layers;
    ForwardMemory<S> memory;
    Index scratch = 0;
    for (Index l = 0; l < L; ++l) {
      const LayerShape layer = shape.layer(l);
      memory.packed.push_back(memory.arena.reserve(direct ? 0 : kernel().forward_packed(layer)));
      scratch =
          std::max(scratch, kernel().forward_scratch(layer, chunk, split.most_rows(), split.team));
    }
    for (int p = 0; p < split.parts; ++p) {
      memory.scratch.push_back(memory.arena.reserve(scratch));
      memory.middle.push_back(memory.arena.reserve(L > 1 ? 2 * between() : 0));
    }
    return memory;
  }

  ReverseMemory<S> lay_out_reverse() const {
    const Index L = shape.num_layers;
    ReverseMemory<S> memory;
    for (Index l = 0; l < L; ++l) {
      memory.packed.push_back(memory.arena.reserve(kernel().reverse_packed(shape.layer(l))));
    }
    for (int p = 0; p < split.parts; ++p) {
      for (Index l = 0; l < L; ++l) {
        memory.scratch.push_back(memory.arena.reserve(
            kernel().reverse_scratch(shape.layer(l), chunk, split.most_rows(), split.team)));
      }
      memory.middle.push_back(memory.arena.reserve(L > 1 ? 2 * between() : 0));
    }
    return memory;
  }

  const ForwardMemory<S>& ready_forward() {
    if (!forward_memory) {
      auto memory = std::make_unique<ForwardMemory<S>>(lay_out_forward());
      memory->arena.allocate();
      for (Index l = 0; l < shape.num_layers && !direct; ++l) {
        kernel().forward_pack(shape.layer(l), weights[l], memory->arena.at(memory->packed[l]));
      }
      forward_memory = std::move(memory);
    }
    return *forward_memory;
  }

  const ReverseMemory<S>& ready_reverse() {
    if (!reverse_memory) {
      auto memory = std::make_unique<ReverseMemory<S>>(lay_out_reverse());
      memory->arena.allocate();
      for (Index l = 0; l < shape.num_layers; ++l) {
        kernel().reverse_pack(shape.layer(l), weights[l], memory->arena.at(memory->packed[l]));
      }
      reverse_memory = std::move(memory);
    }
    return *reverse_memory;
  }

  S* scratch_of(const ReverseMemory<S>& memory, int p, Index l) const {
    return memory.arena.at(memory.scratch[p * shape.num_layers + l]);
  }

  void forward(const Forward<S>& run, S* tape, Interrupt interrupt) {
    const Index L = shape.num_layers, n = run.steps, H = shape.hidden_size;
    copy_state(shape, B, run.initial, run.final);
    if (n == 0) return;
    const ForwardMemory<S>& memory = ready_forward();
    const TapeLayout<S> layout{shape, n, B};
    StopFlag stop(interrupt);
    run_split(split, [&](int p, const Team& team) {
      const Index b = split.begin(p), rows = split.rows(p);
      for (Index t = 0; t < n && !asked_to_stop(stop, team); t += chunk) {
        const Index steps = std::min(chunk, n - t);
        Sequence<const S> x = run.x.from(t, b);
        for (Index l = 0; l < L; ++l) {
          Sequence<S> y;
          if (l == L - 1)
            y = run.y.from(t, b);
          else if (tape)
            y = layout.y(tape, l).from(t, b);
          else
            y = {memory.arena.at(memory.middle[p]) + (l % 2) * between(), rows * H, H};
          kernel().forward({shape.layer(l), steps, rows, x, y,
                            tape ? layout.layer(tape, l).from(t, b) : Sequence<S>{},
                            layer_state(run.final, l, B, H, b),
                            direct ? nullptr : memory.arena.at(memory.packed[l]), weights[l], team,
                            memory.arena.at(memory.scratch[p])});
          x = {y.data, y.step, y.row};
        }
      }
    });
    stop.raise();
  }

  void reverse(const Forward<S>& run, const Reverse<S>& grad, Interrupt interrupt) {
    const Index L = shape.num_layers, H = shape.hidden_size;
    copy_state(shape, B, grad.grad_final, grad.grad_initial);
    if (run.steps == 0) return;
    const bool fresh = !reverse_memory;
    const ReverseMemory<S>& memory = ready_reverse();
    const TapeLayout<const S> layout{shape, run.steps, B};
    StopFlag stop(interrupt);
    run_split(split, [&](int p, const Team& team) {
      const Index b = split.begin(p), rows = split.rows(p);
      for (Index l = 0; l < L && fresh && team.rank == 0; ++l) {
        kernel().reverse_begin(shape.layer(l), scratch_of(memory, p, l));
      }
      for (Index end = run.steps; end > 0 && !asked_to_stop(stop, team);) {
        const Index t = (end - 1) / chunk * chunk;
        Sequence<const S> grad_y = grad.grad_y.from(t, b);
        for (Index l = L - 1; l >= 0; --l) {
          const auto y_of = [&](Index k) {
            return k == L - 1 ? Sequence<const S>{run.y.data, run.y.step, run.y.row}
                              : layout.y(grad.tape, k);
          };
          Sequence<S> grad_x = grad.grad_x.from(t, b);
          if (l > 0) {
            grad_x = {memory.arena.at(memory.middle[p]) + (l % 2) * between(), rows * H, H};
          }
          ReverseJob<S> job{};
          job.shape = shape.layer(l);
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
          job.packed = memory.arena.at(memory.packed[l]);
          job.team = team;
          job.scratch = scratch_of(memory, p, l);
          job.weights = !(grad.frozen && grad.frozen[l]);
          kernel().reverse(job);
          grad_y = {grad_x.data, grad_x.step, grad_x.row};
        }
        end = t;
      }
    });
    stop.raise();
  }
};

template <class S>
Session<S>::Session(const StackShape& shape, const Weights<const S>* weights, Index T, Index B,
                    Index longest)
    : data_(std::make_unique<Data>(shape, weights, T, B, longest)) {}

template <class S>
Session<S>::~Session() = default;

template <class S>
void Session<S>::advance(const Forward<S>& run, Interrupt interrupt) {
  data_->forward(run, nullptr, interrupt);
}

template <class S>
void Session<S>::record(const Forward<S>& run, S* tape, Interrupt interrupt) {
  data_->forward(run, tape, interrupt);
}

template <class S>
void Session<S>::reverse(const Forward<S>& run, const Reverse<S>& grad, Interrupt interrupt) {
  data_->reverse(run, grad, interrupt);
}

template <class S>
void Session<S>::finish(const Weights<S>* grad_weights) {
  const Data& data = *data_;
  if (!data.reverse_memory) return;
  for (Index l = 0; l < data.shape.num_layers; ++l) {
    for (int p = 0; p < data.split.parts && grad_weights[l].w_ih; ++p) {
      data.kernel().reverse_finish(data.shape.layer(l), data.scratch_of(*data.reverse_memory, p, l),
                                   grad_weights[l]);
    }
  }
}

template <class S>
Index Session<S>::nbytes() const {
  return (data_->lay_out_forward().arena.size() + data_->lay_out_reverse().arena.size()) *
         Index(sizeof(S));
}

Index tape_size(const StackShape& shape, Index T, Index B) {
  return TapeLayout<float>{shape, T, B}.size();
}

template <class S>
void copy_tape_step(const StackShape& shape, Index B, const S* step, S* tape, Index T, Index t) {
  const TapeLayout<const S> from{shape, 1, B};
  const TapeLayout<S> to{shape, T, B};
  for (Index l = 0; l < shape.num_layers; ++l) {
    std::copy_n(from.layer(step, l).data, from.layer_size(), to.layer(tape, l).at(t));
    if (l == shape.num_layers - 1) break;
    std::copy_n(from.y(step, l).data, from.y_size(), to.y(tape, l).at(t));
  }
}

template void copy_tape_step(const StackShape&, Index, const float*, float*, Index, Index);
template void copy_tape_step(const StackShape&, Index, const double*, double*, Index, Index);

template class Session<float>;
template class Session<double>;

}  // namespace fastbptt
