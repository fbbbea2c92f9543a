// The three verbs in a session: a stack of layers walked through time in chunks, shared out to the
// threads in one of two ways. Rows of the batch: each thread takes its rows through all of time, so
// there is no barrier; the weight gradients of the threads are added up at the end, always in the
// same order. Or, where the batch is too small for that, hidden units: the threads do each step
// together.
//
// In one direction the layers take turns in each chunk, while it is in the cache. With two a layer
// needs the last step of the one below first, so each runs through all of time before the next.
// Backwards in time a kernel runs over sequences with negative strides, and knows nothing of it.
//
// The kernels know no bfloat16 but in their tape. Where x and y are that, and between the layers
// too, a chunk of x is widened before a kernel reads it, and y narrowed behind the one that wrote
// it, and dL/dy and dL/dx alike. Rows of x and y that lie unevenly in the caller's memory are
// copied in the same places. What is as long as the sequence exists in bfloat16 alone, but for a
// dL/dx to which two directions add.
#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "dispatch/dispatch.h"
#include "fastbptt/buffer.h"
#include "fastbptt/random.h"
#include "fastbptt/recurrent.h"
#include "fastbptt/runtime.h"
#include "memory/caches.h"
#include "memory/zeros.h"
#include "schedules/lengths.h"
#include "schedules/marks.h"
#include "schedules/stop_flag.h"
#include "threads/pool.h"

namespace fastbptt {
namespace {

// Rows of time x batch in a chunk: enough for the products to be worth their set-up, few enough
// that what one layer writes is still in the cache when the next reads it.
constexpr Index chunk_rows = 256;

// Where weights, and so their gradients, are so many bytes, products of parts wait for memory: each
// chunk reads and writes all gradients, and twice as many rows halve that.
constexpr double many_bytes = 16 << 20;

// How far ahead of a copy the rows are fetched that do not lie at one stride.
constexpr Index bytes_ahead = 8 << 10;

// Rows of time x batch up to which packing the weights costs more than it saves.
constexpr Index direct_rows = 8;

// Work between two looks for an interrupt: half a second on a slow core. With a single row, weights
// that are read from memory at each step allow half as much.
constexpr double chunk_flops = 5e9;

// Work a step and thread that is worth a barrier.
constexpr double flops_a_barrier = 5e4;

// Of all layers, one step and row.
double step_flops(const StackShape& s) {
  double columns = 0;
  for (Index k = 0; k < s.layers(); ++k) columns += s.layer(k).input_size + s.output_size();
  return 2.0 * s.hidden_size * (gates(s.cell) * columns + double(s.proj_size * s.layers()));
}

// How the rows of the batch are shared out: to `parts` threads; or, if team > 1, to one part that
// the threads do together.
struct Split {
  int parts;
  int team;
};

// Rows a thread below which the weights are read so often that it is better to share them out. If
// they do not fit into the second cache, each thread then reads only its own part from behind it;
// as long as there are panels enough for all to have about as many.
Index least_rows(const StackShape& s, Index value_bytes, double threads) {
  const double bytes = step_flops(s) / 2 / s.layers() * value_bytes;
  if (bytes <= second_cache || s.hidden_size < 128 * threads) return 4;
  if (bytes <= 2 * second_cache) return 5;
  return bytes <= 4 * second_cache ? 9 : 17;
}

// `rows`: of time x batch.
Split split_work(const StackShape& s, Index value_bytes, Index rows, Index B) {
  const double threads = get_num_threads();
  const double worth = std::max(1.0, step_flops(s) * rows / flops_a_thread);
  const double layer_step = step_flops(s) * B / s.layers();
  if (B < least_rows(s, value_bytes, threads) * threads) {
    const int team = static_cast<int>(std::min({threads, worth, layer_step / flops_a_barrier}));
    // Members that took turns on a CPU would wait for each other at every step. With few CPUs it is
    // still one part: the bits are those of the number of threads.
    if (team >= 2) return {1, std::max(1, std::min(team, usable_cpus()))};
  }
  return {static_cast<int>(std::min({worth, double(B), threads})), 1};
}

// The rows of one thread: those at the ranks first, first + stride, and so on.
struct Part {
  Index rows;
  Index begin;  // rows of the parts before it
  Index first;
  Index stride;
  // Where its rows lie in the caller's sequences, if one stride leads from each to the next.
  bool even;
  Index row;
  Index row_stride;
  Index rank(Index j) const { return first + j * stride; }
  // How many of its rows a block has; they are the first ones.
  Index rows_in(const Block& block) const {
    return block.rows > first ? std::min(rows, (block.rows - first + stride - 1) / stride) : 0;
  }
};

// Where lengths differ, each part takes its share of the long rows and of the short ones.
std::vector<Part> share_rows(const Lengths& lengths, Index B, int count) {
  std::vector<Part> parts;
  Index begin = 0;
  for (int p = 0; p < count; ++p) {
    Part part{};
    part.rows = B / count + (p < B % count);
    part.begin = begin;
    part.first = lengths.given() ? p : begin;
    part.stride = lengths.given() ? count : 1;
    part.row = lengths.row(part.first);
    part.row_stride = part.rows > 1 ? lengths.row(part.rank(1)) - part.row : 1;
    part.even = true;
    for (Index j = 1; j < part.rows; ++j) {
      part.even &= lengths.row(part.rank(j)) == part.row + j * part.row_stride;
    }
    begin += part.rows;
    parts.push_back(part);
  }
  return parts;
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

// A few chunks are alike: a short one at the end reads and writes the weight gradients as often as
// a long one.
Index chunk_steps(const StackShape& s, Index rows, Index T) {
  const double flops = step_flops(s) * (rows == 1 ? 2 : 1);
  const bool many = s.options.parts > 0 && 2.0 * step_flops(s) / s.layers() > many_bytes;
  const double most =
      std::min({double(many ? 2 * chunk_rows : chunk_rows), chunk_flops / flops, double(T) * rows});
  const Index steps = std::max<Index>(1, static_cast<Index>(most) / rows);
  if (T >= 4 * steps) return steps;
  const Index chunks = std::max<Index>(1, (2 * T + steps) / (2 * steps));
  return std::max<Index>(1, (T + chunks - 1) / chunks);
}

// Where the parts of a tape lie: each layer's own, then y of every layer but the last, each block
// behind the one before; then, where lengths differ, the states that the blocks begin with.
template <class S, class E = S>
struct TapeLayout {
  const StackShape& shape;
  const Blocks& blocks;
  bool states;
  Index width() const { return shape.layer(0).tape_size(); }
  bool narrow() const { return shape.options.narrow_tape; }
  // Elements of S that a layer's own tape takes, and y of a layer.
  template <class V>
  static Index taken(Index values) {
    return (values * Index(sizeof(V)) + Index(sizeof(S)) - 1) / Index(sizeof(S));
  }
  Index own() const {
    const Index values = blocks.rows * width();
    return narrow() ? taken<Bfloat16>(values) : values;
  }
  Index own_y() const { return taken<E>(blocks.rows * y_width()); }
  Index y_width() const { return shape.directions * shape.output_size(); }
  Index y_offset() const { return shape.layers() * own(); }
  Index h_offset() const { return y_offset() + (shape.num_layers - 1) * own_y(); }
  Index c_offset() const {
    return h_offset() + (states ? shape.layers() * blocks.starts * shape.output_size() : 0);
  }
  Index size() const {
    const bool cells = states && has_cell_state(shape.cell);
    return c_offset() + (cells ? shape.layers() * blocks.starts * shape.hidden_size : 0);
  }
  S* layer(S* tape, Index k) const { return tape + k * own(); }
  E* y(S* tape, Index l) const { return reinterpret_cast<E*>(tape + y_offset() + l * own_y()); }
  State<S> start(S* tape, Index k, const Block& block) const {
    const Index row = k * blocks.starts + block.before;
    return {tape + h_offset() + row * shape.output_size(),
            has_cell_state(shape.cell) ? tape + c_offset() + row * shape.hidden_size : nullptr};
  }
};

// The rows of layer k from row b on.
template <class S>
State<S> layer_state(const StackShape& s, State<S> all, Index k, Index B, Index b) {
  const Index row = k * B + b;
  return {all.h ? all.h + row * s.output_size() : nullptr,
          all.c ? all.c + row * s.hidden_size : nullptr};
}

// Rows [0, n) of both parts of a state, each row from and to where the functions say.
template <class S, class From, class To>
void copy_rows(const LayerShape& s, Index n, State<const S> from, From&& row, State<S> to,
               To&& row_to) {
  const auto copy = [&](const S* source, S* target, Index columns) {
    for (Index i = 0; i < n; ++i) {
      S* const own = target + row_to(i) * columns;
      source ? std::copy_n(source + row(i) * columns, columns, own)
             : std::fill_n(own, columns, S(0));
    }
  };
  copy(from.h, to.h, s.output_size());
  if (has_cell_state(s.cell)) copy(from.c, to.c, s.hidden_size);
}

template <class S>
S widened(S value) {
  return value;
}

// n values to where another type stands for them, rounded to nearest.
template <class S>
void copy_values(const S* from, Index n, S* to) {
  std::copy_n(from, n, to);
}
void copy_values(const Bfloat16* from, Index n, float* to) {
  kernels().bfloat16.widen(from, n, to);
}
void copy_values(const float* from, Index n, Bfloat16* to) {
  kernels().bfloat16.narrow(from, n, to);
}

// Fetches the row that is copied some rows behind row j of step s: rows that lie unevenly come from
// memory one by one. Inlined, as `fetch` is.
template <class At>
__attribute__((always_inline)) inline void fetch_ahead(Index s, Index j, Index rows, Index steps,
                                                       Index columns, const At& at) {
  constexpr Index size = Index(sizeof(*at(0, 0)));
  j += 1 + bytes_ahead / (columns * size);
  if (j >= rows * (steps - s)) return;
  for (; j >= rows; j -= rows) ++s;
  fetch(at(s, j), columns);
}

template <class S>
void fill_zero(const LayerShape& s, const Weights<S>& weights) {
  for (int which = 0; which < weights_a_layer; ++which) {
    const WeightShape shape = weight_shape(s, which);
    S* const values = weights.*weight_member<S>[which];
    if (values) std::fill_n(values, shape.rows * std::max<Index>(1, shape.columns), S(0));
  }
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
  std::vector<Index> middle;   // two chunks of y between layers, for advance
  std::vector<Index> dropped;  // a chunk of what dropout left
  std::vector<Index> x;        // chunks of the caller's, where rows lie unevenly there
  std::vector<Index> y;
  std::vector<Index> cells;
};

// The memory of reverse; scratch by part and layer, with the weight gradients so far.
template <class S>
struct ReverseMemory {
  Arena<S> arena;
  std::vector<Index> packed;
  std::vector<Index> scratch;
  std::vector<Index> middle;  // two chunks of dL/dx between layers
  std::vector<Index> dropped;
  std::vector<Index> mask;
  std::vector<Index> x;
  std::vector<Index> y;  // with the step before the chunk
  std::vector<Index> grad_cells;
  std::vector<Index> grad_x;   // a chunk that is still to be added
  std::vector<Index> start;    // the state that a block begins with
  std::vector<Index> restart;  // what resets give back to the learned states, by part
  // Whether the scratch has weight gradients yet: one for each member of a team, who must not see
  // what another has just set.
  std::vector<char> gathered;
};

// Steps [t0, t1) of a block: what a kernel is called for.
struct Chunk {
  const Block* block;
  Index t0;
  Index t1;
  Index rows;  // of the part
  Index steps() const { return t1 - t0; }
};

// In the order of time of direction d: the last step of some comes first in direction 1.
template <class S>
Sequence<S> directed(const Sequence<S>& all, Index steps, Index d) {
  if (d == 0 || !all.data) return all;
  return {all.at(steps - 1), -all.step, all.row};
}

template <class S>
Sequence<const S> read_only(const Sequence<S>& all) {
  return {all.data, all.step, all.row};
}

}  // namespace

template <class E>
struct Session<E>::Data {
  static constexpr bool narrow = !std::is_same_v<E, S>;
  StackShape shape;
  Buffer<S> wide_weights;  // where the caller's are narrow
  std::vector<Weights<const S>> weights;
  Index B;
  Lengths lengths;
  bool packed;
  bool drops;
  bool seeded;
  std::uint64_t seed;
  Index longest;
  Blocks all;
  Split split;
  std::vector<Part> parts;
  bool direct;
  Index capacity;  // rows of time x batch in a chunk, at most
  Marks marks;
  std::vector<S> recurrent_masks;  // [L*D, B, H], rows in the order of the parts
  std::unique_ptr<ForwardMemory<S>> forward_memory;
  std::unique_ptr<ReverseMemory<S>> reverse_memory;
  std::vector<S> grad_learned;  // of the learned states, by layer, h and then c

  Data(const StackShape& s, const Weights<const E>* w, const Batch& batch, Index most_steps)
      : shape(s),
        weights(in_arithmetic(w)),
        B(batch.B),
        lengths(batch),
        packed(batch.packed),
        drops(batch.seed && s.dropout > 0 && s.num_layers > 1),
        seeded(batch.seed),
        seed(batch.seed ? *batch.seed : 0),
        longest(most_steps),
        all(lengths.blocks(batch.begin, batch.T)),
        split(split_work(s, sizeof(S), all.rows, batch.B)),
        parts(share_rows(lengths, batch.B, split.parts)),
        direct(all.rows <= direct_rows),
        capacity(0),
        marks(batch, shape.directions, row_numbers()) {
    shape.options.resets = marks.given(0);
    shape.options.mask = marks.given(1);
    if (batch.seed) draw_recurrent_masks();
    choose_parts();
    for_sizes([&](Index steps, Index rows) { capacity = std::max(capacity, steps * rows); });
    if (learns_state()) grad_learned.assign(shape.layers() * state_width(), S(0));
  }

  std::vector<Weights<const S>> in_arithmetic(const Weights<const E>* given) {
    std::vector<Weights<const S>> all(shape.layers());
    Index size = 0;
    const auto for_each = [&](auto&& f) {
      for (Index k = 0; k < shape.layers(); ++k) {
        for (int which = 0; which < weights_a_layer; ++which) {
          const WeightShape w = weight_shape(shape.layer(k), which);
          const E* const from = given[k].*weight_member<const E>[which];
          if (from) f(from, w.rows * std::max<Index>(1, w.columns), k, which);
        }
      }
    };
    if constexpr (narrow) {
      for_each([&](const E*, Index n, Index, int) { size += n; });
      wide_weights = Buffer<S>(size);
    }
    S* next = wide_weights.data();
    for_each([&](const E* from, Index n, Index k, int which) {
      if constexpr (narrow) {
        copy_values(from, n, next);
        all[k].*weight_member<const S>[which] = next;
        next += n;
      } else {
        all[k].*weight_member<const S>[which] = from;
      }
    });
    return all;
  }

  static const LayerKernels<S>& kernel() { return kernels().layer<S>(); }
  // One choice for all layers and blocks.
  void choose_parts() {
    const PartProducts* const products = part_products();
    if (!std::is_same_v<S, float> || !products || direct || shape.options.layer_norm) return;
    // Of what is bfloat16 anyway one part is enough, unless the layer asks for more.
    const MatmulPrecision set = narrow ? MatmulPrecision::medium : get_float32_matmul_precision();
    const MatmulPrecision precision =
        shape.precision == MatmulPrecision::as_set ? set : shape.precision;
    shape.options.parts = products->parts(shape.layer(0), precision, parts[0].rows, all.rows);
    shape.options.part_depth = static_cast<int>(products->depth);
  }
  // The caller's rows in the order of the parts.
  std::vector<Index> row_numbers() const {
    std::vector<Index> rows;
    for (const Part& part : parts) {
      for (Index j = 0; j < part.rows; ++j) rows.push_back(lengths.row(part.rank(j)));
    }
    return rows;
  }

  // Each unit is dropped for all of time (Gal & Ghahramani 2016).
  void draw_recurrent_masks() {
    const double p = shape.options.recurrent_dropout;
    const Index R = shape.output_size(), n = shape.layers() * B;
    if (p == 0) return;
    recurrent_masks.resize(n * R);
    for (Index i = 0; i < n; ++i) {
      draw_mask(seed, {Draw::recurrent_dropout, i / B, 0, marks.rows[i % B]}, p,
                p < 1 ? S(1 / (1 - p)) : S(0), R, &recurrent_masks[i * R]);
    }
  }

  bool ragged() const { return lengths.given(); }
  bool learns_state() const { return weights[0].h0 != nullptr; }
  // Whether rows may begin anew with the learned state.
  bool restarts() const { return learns_state() && marks.given(0); }
  Index cells_width() const { return has_cell_state(shape.cell) ? shape.hidden_size : 0; }
  Index y_width() const { return shape.directions * shape.output_size(); }
  Index state_width() const {
    return shape.output_size() + (has_cell_state(shape.cell) ? shape.hidden_size : 0);
  }
  // Calls f(steps, rows) for each size that a chunk can have.
  template <class F>
  void for_sizes(F&& f) const {
    Index last = 0;
    for (const Block& block : all.list) {
      for (const Part& part : parts) {
        const Index rows = part.rows_in(block);
        if (rows > 0 && rows != last) f(chunk_steps(shape, rows, longest), rows);
        last = rows;
      }
    }
  }

  // Of an x that a layer gets from a chunk of its own: the others take y of the layer below as it
  // is.
  Index most_columns() const {
    const bool between = narrow && shape.num_layers > 1;
    return between ? std::max(shape.input_size, y_width()) : shape.input_size;
  }

  ForwardMemory<S> lay_out_forward() const {
    const Index L = shape.num_layers;
    ForwardMemory<S> memory;
    Index scratch = 0;
    for (Index k = 0; k < shape.layers(); ++k) {
      const LayerShape layer = shape.layer(k);
      memory.packed.push_back(memory.arena.reserve(direct ? 0 : kernel().forward_packed(layer)));
      for_sizes([&](Index steps, Index rows) {
        scratch = std::max(scratch, kernel().forward_scratch(layer, steps, rows, split.team));
      });
    }
    for (std::size_t p = 0; p < parts.size(); ++p) {
      const auto chunk = [&](bool needed, Index columns) {
        return memory.arena.reserve(needed ? capacity * columns : 0);
      };
      memory.scratch.push_back(memory.arena.reserve(scratch));
      const bool in_chunks = narrow || !parts[p].even;
      memory.middle.push_back(chunk(L > 1 && shape.directions == 1, 2 * y_width()));
      memory.dropped.push_back(chunk(drops, y_width()));
      memory.x.push_back(chunk(in_chunks, most_columns()));
      memory.y.push_back(chunk(in_chunks, shape.output_size()));
      memory.cells.push_back(chunk(!parts[p].even, cells_width()));
    }
    return memory;
  }

  ReverseMemory<S> lay_out_reverse() const {
    const Index L = shape.num_layers, K = shape.layers(), R = shape.output_size();
    ReverseMemory<S> memory;
    for (Index k = 0; k < K; ++k) {
      memory.packed.push_back(memory.arena.reserve(kernel().reverse_packed(shape.layer(k))));
    }
    for (const Part& part : parts) {
      const auto chunk = [&](bool needed, Index columns) {
        return memory.arena.reserve(needed ? capacity * columns : 0);
      };
      for (Index k = 0; k < K; ++k) {
        Index scratch = 0;
        for_sizes([&](Index steps, Index rows) {
          scratch =
              std::max(scratch, kernel().reverse_scratch(shape.layer(k), steps, rows, split.team));
        });
        memory.scratch.push_back(memory.arena.reserve(scratch));
      }
      const bool both = shape.directions == 2;
      memory.middle.push_back(chunk(L > 1 && !both, 2 * R));
      memory.dropped.push_back(chunk(drops, y_width()));
      memory.mask.push_back(chunk(drops, y_width()));
      const bool in_chunks = narrow || !part.even;
      memory.x.push_back(chunk(in_chunks, most_columns()));
      memory.y.push_back(memory.arena.reserve(in_chunks ? (capacity + part.rows) * R : 0));
      memory.grad_cells.push_back(chunk(!part.even, cells_width()));
      memory.restart.push_back(
          memory.arena.reserve(restarts() ? shape.layers() * state_width() : 0));
      memory.grad_x.push_back(chunk(both, std::max(shape.input_size, y_width())));
      memory.start.push_back(
          memory.arena.reserve(ragged() && part.stride > 1 ? part.rows * state_width() : 0));
    }
    return memory;
  }

  const ForwardMemory<S>& ready_forward() {
    if (!forward_memory) {
      auto memory = std::make_unique<ForwardMemory<S>>(lay_out_forward());
      memory->arena.allocate();
      for (Index k = 0; k < shape.layers() && !direct; ++k) {
        kernel().forward_pack(shape.layer(k), weights[k], memory->arena.at(memory->packed[k]));
      }
      forward_memory = std::move(memory);
    }
    return *forward_memory;
  }

  Index gathered_at(Index part_or_member, Index k) const {
    return part_or_member * shape.layers() + k;
  }

  ReverseMemory<S>& ready_reverse() {
    if (!reverse_memory) {
      auto memory = std::make_unique<ReverseMemory<S>>(lay_out_reverse());
      memory->arena.allocate();
      memory->gathered.resize(gathered_at(std::max<Index>(parts.size(), split.team), 0));
      for (Index k = 0; k < shape.layers(); ++k) {
        kernel().reverse_pack(shape.layer(k), weights[k], memory->arena.at(memory->packed[k]));
        for (std::size_t p = 0; p < parts.size(); ++p) {
          kernel().reverse_begin(shape.layer(k), scratch_of(*memory, p, k));
        }
      }
      for (std::size_t p = 0; p < parts.size() && restarts(); ++p) {
        std::fill_n(memory->arena.at(memory->restart[p]), shape.layers() * state_width(), S(0));
      }
      reverse_memory = std::move(memory);
    }
    return *reverse_memory;
  }

  S* scratch_of(const ReverseMemory<S>& memory, Index p, Index k) const {
    return memory.arena.at(memory.scratch[p * shape.layers() + k]);
  }

  // What the rows of the batch begin with, null for zeros, in the caller's order.
  Buffer<S> learned_start() const {
    const Index K = shape.layers(), R = shape.output_size(), H = shape.hidden_size;
    Buffer<S> buffer(K * B * state_width());
    const State<S> start = state_in(buffer.data());
    for (Index k = 0; k < K; ++k) {
      for (Index b = 0; b < B; ++b) {
        std::copy_n(weights[k].h0, R, start.h + (k * B + b) * R);
        if (start.c) std::copy_n(weights[k].c0, H, start.c + (k * B + b) * H);
      }
    }
    return buffer;
  }
  State<S> state_in(S* data) const {
    return {data,
            has_cell_state(shape.cell) ? data + shape.layers() * B * shape.output_size() : nullptr};
  }

  // The learned state gets what comes back to the begin of the sequence, of all rows.
  void gather_learned(const State<S>& grad) {
    const Index R = shape.output_size(), H = shape.hidden_size;
    for (Index k = 0; k < shape.layers(); ++k) {
      S* const to = grad_learned.data() + k * state_width();
      for (Index b = 0; b < B; ++b) {
        for (Index i = 0; i < R; ++i) to[i] += grad.h[(k * B + b) * R + i];
        for (Index i = 0; i < H && grad.c; ++i) to[R + i] += grad.c[(k * B + b) * H + i];
      }
    }
  }

  // A state in the order of the parts, in which a thread's rows follow each other.
  struct OwnState {
    Buffer<S> buffer;
    State<S> view;
  };

  // `from` copied to where the verbs work on it: in `to` itself where all is in the caller's order.
  OwnState begin_state(const State<const S>& from, const State<S>& to) const {
    OwnState own;
    own.view = to;
    if (ragged()) {
      own.buffer = Buffer<S>(shape.layers() * B * state_width());
      own.view = state_in(own.buffer.data());
    }
    for_rows([&](Index k, const Part& part) {
      copy_rows(
          shape.layer(k), part.rows, layer_state(shape, from, k, B, 0),
          [&](Index j) { return lengths.row(part.rank(j)); },
          layer_state(shape, own.view, k, B, part.begin), [](Index j) { return j; });
    });
    return own;
  }
  void end_state(const OwnState& own, const State<S>& to) const {
    if (!ragged()) return;
    for_rows([&](Index k, const Part& part) {
      const State<S> rows = layer_state(shape, own.view, k, B, part.begin);
      copy_rows<S>(
          shape.layer(k), part.rows, {rows.h, rows.c}, [](Index j) { return j; },
          layer_state(shape, to, k, B, 0), [&](Index j) { return lengths.row(part.rank(j)); });
    });
  }
  template <class F>
  void for_rows(F&& f) const {
    for (Index k = 0; k < shape.layers(); ++k) {
      for (const Part& part : parts) f(k, part);
    }
  }

  // Calls f(chunk) for the chunks of a part, in the order of time of `d` or, if not forward,
  // against it.
  template <class F>
  void for_chunks(const Blocks& blocks, const Part& part, bool ascending, F&& f) const {
    const Index count = static_cast<Index>(blocks.list.size());
    for (Index i = 0; i < count; ++i) {
      const Block& block = blocks.list[ascending ? i : count - 1 - i];
      const Index rows = part.rows_in(block);
      if (rows == 0) continue;
      const Index chunk = chunk_steps(shape, rows, longest);
      const Index n = (block.t1 - block.t0 + chunk - 1) / chunk;
      for (Index j = 0; j < n; ++j) {
        const Index t0 = block.t0 + (ascending ? j : n - 1 - j) * chunk;
        if (!f(Chunk{&block, t0, std::min(t0 + chunk, block.t1), rows})) return;
      }
    }
  }

  // One call of a verb, as one thread sees it.
  struct Walk {
    const Forward<E>& run;
    const Blocks& blocks;
    const Part& part;
    Index p;
    const Team& team;
  };

  // Calls f(i) for i in [0, n), shared out to the team, and waits for all.
  template <class F>
  static void each(const Team& team, Index n, F&& f) {
    for (Index i = team.begin(n); i < team.end(n); ++i) f(i);
    team.wait();
  }

  // The rows of a chunk in an array of the session's own, [rows of time x batch, columns].
  template <class T>
  Sequence<T> inside(const Walk& w, const Chunk& c, T* base, Index columns, Index from) const {
    const Block& b = *c.block;
    return {base + (b.first + (c.t0 - b.t0) * b.rows + w.part.first) * columns + from,
            b.rows * columns, w.part.stride * columns};
  }

  // The tape of layer k in a chunk, in the order of direction d.
  template <class T, class Y>
  Tape<T> kernel_tape(const Walk& w, const Chunk& c, const TapeLayout<T, Y>& layout, T* tape,
                      Index k, Index d) const {
    T* const own = layout.layer(tape, k);
    const auto steps = [&](auto* base) {
      return directed(inside(w, c, base, layout.width(), 0), c.steps(), d);
    };
    if (layout.narrow()) return {{}, steps(reinterpret_cast<Narrow<T>*>(own))};
    return {steps(own), {}};
  }

  // The steps of a chunk in a sequence of the caller's, and its rows, if they lie evenly.
  template <class T>
  Sequence<T> outside(const Walk& w, const Chunk& c, const Sequence<T>& all) const {
    if (!all.data) return all;
    const Block& b = *c.block;
    Sequence<T> own = all;
    if (packed) {
      own.step = b.rows * all.row;
      own.data = all.data + (b.first + (c.t0 - b.t0) * b.rows) * all.row;
    } else {
      own.data = all.at(c.t0 - w.run.begin);
    }
    if (!w.part.even) return own;
    return {own.at(0, w.part.row), own.step, w.part.row_stride * all.row};
  }

  // Whose row j of the part is in a sequence of the session's, or, as outside() gave it, the
  // caller's.
  enum class Whose { own, callers };
  // Whether its rows lie at more than one stride.
  static bool uneven(const Walk& w, Whose whose) { return whose == Whose::callers && !w.part.even; }
  Index row_in(const Walk& w, Whose whose, Index j) const {
    return uneven(w, whose) ? lengths.row(w.part.rank(j)) : j;
  }

  // Steps [from, n) of a chunk, in the order of direction d, copied to rows that follow each other.
  template <class T>
  Sequence<const S> gathered(const Walk& w, const Chunk& c, Whose whose,
                             const Sequence<const T>& all, Index d, Index from, Index columns,
                             S* to) const {
    const Sequence<const T> own = directed(all, c.steps(), d);
    const auto at = [&](Index s, Index j) { return own.at(from + s, row_in(w, whose, j)); };
    const bool dense = !uneven(w, whose) && own.row == columns;
    each(w.team, c.steps() - from, [&](Index s) {
      if (dense) return copy_values(at(s, 0), c.rows * columns, to + s * c.rows * columns);
      for (Index j = 0; j < c.rows; ++j) {
        if (uneven(w, whose)) fetch_ahead(s, j, c.rows, c.steps() - from, columns, at);
        copy_values(at(s, j), columns, to + (s * c.rows + j) * columns);
      }
    });
    return {to - from * c.rows * columns, c.rows * columns, columns};
  }
  // The same back: rows that follow each other to columns [first, first + columns) of a sequence.
  template <class T>
  void scatter(const Walk& w, const Chunk& c, Whose whose, const Sequence<S>& from, Index d,
               Index columns, Index first, const Sequence<T>& all) const {
    const Sequence<T> to = directed(all, c.steps(), d);
    const auto at = [&](Index s, Index j) { return to.at(s, row_in(w, whose, j)) + first; };
    const bool dense = !uneven(w, whose) && from.row == columns && to.row == columns;
    each(w.team, c.steps(), [&](Index s) {
      if (dense) return copy_values(from.at(s), c.rows * columns, at(s, 0));
      for (Index j = 0; j < c.rows; ++j) {
        if (uneven(w, whose)) fetch_ahead(s, j, c.rows, c.steps(), columns, at);
        copy_values(from.at(s, j), columns, at(s, j));
      }
    });
  }
  // Where the kernels can take it as it lies, it is not copied.
  template <class T>
  Sequence<const S> in_place_or_gathered(const Walk& w, const Chunk& c, Whose whose,
                                         const Sequence<const T>& all, Index d, Index from,
                                         Index columns, S* to) const {
    if constexpr (std::is_same_v<T, S>) {
      if (!all.data || !uneven(w, whose)) return directed(all, c.steps(), d);
    }
    return gathered(w, c, whose, all, d, from, columns, to);
  }

  // x of a layer: the caller's, or what the one below gave, after the dropout, whose mask stays
  // behind; in the order of direction d.
  template <class Below>
  Sequence<const S> input(const Walk& w, const Chunk& c, Index l, Index d, S* gather, S* mask,
                          S* dropped, Below&& below) const {
    if (l == 0) {
      return in_place_or_gathered(w, c, Whose::callers, outside(w, c, w.run.x), d, 0,
                                  shape.input_size, gather);
    }
    const Sequence<const E> x = below(l - 1);
    if (drops) {
      const Sequence<S> to{dropped, c.rows * y_width(), y_width()};
      each(w.team, c.steps() * c.rows, [&](Index i) {
        const Index t = i / c.rows, j = i % c.rows;
        S* const own = mask + i * y_width();
        draw(w, c.t0 + t, j, l - 1, own);
        multiply(y_width(), own, x.at(t, j), to.at(t, j));
      });
      return directed(read_only(to), c.steps(), d);
    }
    return in_place_or_gathered(w, c, Whose::own, x, d, 0, y_width(), gather);
  }

  // What layer k does beside its cell's formula in a chunk.
  StepOptions<S> step_options(const Walk& w, const Chunk& c, Index k, Index d) const {
    StepOptions<S> options{};
    const auto mark = [&](Index which) {
      const Sequence<const bool> all = marks.of(which, d);
      return all.data ? directed(all.from(c.t0 - marks.begin, w.part.begin), c.steps(), d) : all;
    };
    options.resets = mark(0);
    options.mask = mark(1);
    options.restart = {weights[k].h0, weights[k].c0};
    if (!recurrent_masks.empty()) {
      options.recurrent_mask = &recurrent_masks[(k * B + w.part.begin) * shape.output_size()];
    }
    const LayerOptions& o = shape.options;
    options.zoneout = {o.zoneout_h,
                       o.zoneout_c,
                       seeded ? &seed : nullptr,
                       k,
                       d == 0 ? c.t0 : c.t1 - 1,
                       d == 0 ? 1 : -1,
                       &marks.rows[w.part.begin]};
    return options;
  }

  // What the dropout multiplies the output of layer l by, at one step of one row.
  void draw(const Walk& w, Index t, Index j, Index l, S* mask) const {
    const S kept = shape.dropout < 1 ? S(1 / (1 - shape.dropout)) : S(0);
    const Place place{Draw::dropout, l, t, lengths.row(w.part.rank(j))};
    kernel().draw_mask(seed, place, shape.dropout, kept, y_width(), mask);
  }
  template <class T>
  static void multiply(Index n, const S* a, const T* b, S* to) {
    for (Index i = 0; i < n; ++i) to[i] = a[i] * widened(b[i]);
  }

  // Zeros behind the length of each row, in the order in which they lie.
  template <class T>
  void clear_padding(const Forward<E>& run, const Sequence<T>& to, Index columns) const {
    if (!ragged() || packed || !to.data) return;
    const bool far = run.steps * B * columns * Index(sizeof(T)) > second_cache;
    const bool by_rows = to.step < to.row;
    run_split(split, [&](int p, const Team& team) {
      const Part& part = parts[p];
      // From which step on row j has none.
      const auto end = [&](Index j) {
        return std::max<Index>(lengths.length(part.rank(j)) - run.begin, 0);
      };
      const auto clear = [&](Index s, Index j, Index n) {
        T* const at = to.at(s, lengths.row(part.rank(j)));
        if (far) {
          write_zeros(at, n * sizeof(T));
        } else {
          std::fill_n(at, n, T{});
        }
      };
      const Index n = by_rows ? part.rows : run.steps;
      for (Index i = team.begin(n); i < team.end(n); ++i) {
        if (!by_rows) {
          for (Index j = part.rows; j > 0 && end(j - 1) <= i; --j) clear(i, j - 1, columns);
        } else if (to.step == columns) {
          if (end(i) < run.steps) clear(end(i), i, (run.steps - end(i)) * columns);
        } else {
          for (Index s = end(i); s < run.steps; ++s) clear(s, i, columns);
        }
      }
      if (far) zeros_written();
    });
  }

  // Calls step(l, d, chunk) for all of a part: the layers forward, or backward from the last.
  template <class F>
  void for_layers(const Walk& w, bool forward, StopFlag& stop, F&& step) const {
    const Index L = shape.num_layers;
    if (shape.directions == 1) {
      for_chunks(w.blocks, w.part, forward, [&](const Chunk& c) {
        if (asked_to_stop(stop, w.team)) return false;
        for (Index i = 0; i < L; ++i) step(forward ? i : L - 1 - i, 0, c);
        return true;
      });
      return;
    }
    for (Index i = 0; i < L; ++i) {
      for (Index d = 0; d < 2; ++d) {
        for_chunks(w.blocks, w.part, forward == (d == 0), [&](const Chunk& c) {
          if (asked_to_stop(stop, w.team)) return false;
          step(forward ? i : L - 1 - i, d, c);
          return true;
        });
      }
    }
  }

  void forward(const Forward<E>& run, S* tape, Interrupt interrupt) {
    const Index L = shape.num_layers, D = shape.directions, R = shape.output_size();
    const Blocks blocks = lengths.blocks(run.begin, run.begin + run.steps);
    const bool learned = learns_state() && !run.initial.h;
    const Buffer<S> start = learned ? learned_start() : Buffer<S>();
    const State<S> learned_state = learned ? state_in(start.data()) : State<S>{};
    const State<const S> from =
        learned ? State<const S>{learned_state.h, learned_state.c} : run.initial;
    const OwnState state = begin_state(from, run.final);
    clear_padding(run, run.y, y_width());
    clear_padding(run, run.cells, D * cells_width());
    if (blocks.rows == 0) return end_state(state, run.final);
    const ForwardMemory<S>& memory = ready_forward();
    const TapeLayout<S, E> layout{shape, blocks, ragged()};
    const Buffer<E> between(!tape && D == 2 && L > 1 ? 2 * blocks.rows * y_width() : 0);
    StopFlag stop(interrupt);
    run_split(split, [&](int p, const Team& team) {
      const Walk w{run, blocks, parts[p], p, team};
      // y of a layer below the last, all directions.
      const auto middle = [&](Index l, const Chunk& c) -> Sequence<E> {
        if (tape) return inside(w, c, layout.y(tape, l), y_width(), 0);
        if (D == 2)
          return inside(w, c, between.data() + l % 2 * blocks.rows * y_width(), y_width(), 0);
        E* const chunks = reinterpret_cast<E*>(memory.arena.at(memory.middle[p]));
        return {chunks + l % 2 * capacity * R, c.rows * R, R};
      };
      for_layers(w, true, stop, [&](Index l, Index d, const Chunk& c) {
        const Index k = l * D + d;
        const State<S> own = layer_state(shape, state.view, k, B, w.part.begin);
        const bool begins = d == 0 ? c.t0 == c.block->t0 : c.t1 == c.block->t1;
        if (tape && ragged() && begins) {
          const State<S> kept = layout.start(tape, k, *c.block);
          if (team.rank == 0) {
            copy_rows<S>(
                shape.layer(k), c.rows, {own.h, own.c}, [](Index j) { return j; }, kept,
                [&](Index j) { return w.part.rank(j); });
          }
          team.wait();
        }
        const bool top = l == L - 1, uneven = top && !w.part.even;
        const Whose whose = top ? Whose::callers : Whose::own;
        const Sequence<E> y = top ? outside(w, c, run.y) : middle(l, c);
        ForwardJob<S> job{};
        job.shape = shape.layer(k);
        job.steps = c.steps();
        job.batch = c.rows;
        S* const dropped = memory.arena.at(memory.dropped[p]);
        job.x = input(w, c, l, d, memory.arena.at(memory.x[p]), dropped, dropped,
                      [&](Index below) { return read_only(middle(below, c)); });
        job.y = {memory.arena.at(memory.y[p]), c.rows * R, R};
        if constexpr (!narrow) {
          if (!uneven) job.y = directed(Sequence<S>{y.data + d * R, y.step, y.row}, c.steps(), d);
        }
        job.narrow_y = narrow;
        if (tape) {
          job.tape = kernel_tape(w, c, layout, tape, k, d);
        }
        job.state = own;
        job.packed = direct ? nullptr : memory.arena.at(memory.packed[k]);
        job.weights = weights[k];
        job.team = team;
        job.scratch = memory.arena.at(memory.scratch[p]);
        job.products = part_products();
        job.options = step_options(w, c, k, d);
        const Index C = cells_width();
        const bool with_cells = top && run.cells.data;
        if (with_cells && uneven) {
          job.options.c = {memory.arena.at(memory.cells[p]), c.rows * C, C};
        } else if (with_cells) {
          const Sequence<S> cells = outside(w, c, run.cells);
          job.options.c =
              directed(Sequence<S>{cells.data + d * C, cells.step, cells.row}, c.steps(), d);
        }
        kernel().forward(job);
        if (narrow || uneven) scatter(w, c, whose, job.y, d, R, d * R, y);
        if (with_cells && uneven) {
          scatter(w, c, whose, job.options.c, d, C, d * C, outside(w, c, run.cells));
        }
      });
    });
    stop.raise();
    end_state(state, run.final);
  }

  template <class G>
  void reverse(const Forward<E>& run, const Reverse<S, G>& grad, Interrupt interrupt) {
    const Blocks blocks = lengths.blocks(run.begin, run.begin + run.steps);
    const bool learned = learns_state() && !run.initial.h;
    const OwnState state = begin_state(grad.grad_final, grad.grad_initial);
    clear_padding(run, grad.grad_x, shape.input_size);
    if (blocks.rows > 0) {
      const Buffer<S> start = learned && !ragged() ? learned_start() : Buffer<S>();
      State<const S> initial = run.initial;
      if (start.size() > 0) {
        const State<S> found = state_in(start.data());
        initial = {found.h, found.c};
      }
      reverse_blocks(run, grad, blocks, initial, state.view, interrupt);
    }
    end_state(state, grad.grad_initial);
    if (learned) gather_learned(grad.grad_initial);
  }

  template <class G>
  void reverse_blocks(const Forward<E>& run, const Reverse<S, G>& grad, const Blocks& blocks,
                      const State<const S>& initial, const State<S>& state, Interrupt interrupt) {
    constexpr bool narrow_grads = !std::is_same_v<G, S>;
    const Index L = shape.num_layers, D = shape.directions, R = shape.output_size();
    ReverseMemory<S>& memory = ready_reverse();
    const TapeLayout<const S, const E> layout{shape, blocks, ragged()};
    const Buffer<S> between(D == 2 && L > 1 ? 2 * blocks.rows * y_width() : 0);
    // Where the caller's are narrow, of each part a chunk of dL/dy and of dL/dx; but all of dL/dx
    // where another direction adds to it.
    const bool wants_x = narrow_grads && grad.grad_x.data;
    const Index wide_columns =
        narrow_grads ? y_width() + (wants_x && D == 1 ? shape.input_size : 0) : 0;
    const Buffer<S> wide_chunks(static_cast<Index>(parts.size()) * capacity * wide_columns);
    const Buffer<S> wide_x(wants_x && D == 2 ? blocks.rows * shape.input_size : 0);
    StopFlag stop(interrupt);
    run_split(split, [&](int p, const Team& team) {
      const Walk w{run, blocks, parts[p], p, team};
      // dL/dy of a layer below the last, all directions.
      const auto middle = [&](Index l, const Chunk& c) -> Sequence<S> {
        if (D == 2)
          return inside(w, c, between.data() + l % 2 * blocks.rows * y_width(), y_width(), 0);
        return {memory.arena.at(memory.middle[p]) + l % 2 * capacity * R, c.rows * R, R};
      };
      for_layers(w, false, stop, [&](Index l, Index d, const Chunk& c) {
        const Index k = l * D + d, n = c.steps();
        const bool even = w.part.even, top = l == L - 1;
        const Index t_begin = d == 0 ? c.t0 : c.t1;
        const Index block_begin = d == 0 ? c.block->t0 : c.block->t1;
        // The columns of direction d, and these as the kernel takes them.
        const auto columns_of = [&](auto all, Index columns) {
          if (all.data) all.data += d * columns;
          return all;
        };
        const auto own_columns = [&](const auto& all, Whose whose, Index from, Index columns,
                                     S* to) {
          return in_place_or_gathered(w, c, whose, columns_of(all, columns), d, from, columns, to);
        };
        ReverseJob<S> job{};
        job.shape = shape.layer(k);
        job.steps = n;
        job.batch = c.rows;
        job.first = t_begin == block_begin;
        job.initial = ragged() ? start_of(w, c, k, layout, grad.tape, job.first,
                                          memory.arena.at(memory.start[p]))
                               : layer_state(shape, initial, k, B, w.part.begin);
        S* const mask = memory.arena.at(memory.mask[p]);
        job.x = input(
            w, c, l, d, memory.arena.at(memory.x[p]), mask, memory.arena.at(memory.dropped[p]),
            [&](Index below) { return inside(w, c, layout.y(grad.tape, below), y_width(), 0); });
        const Whose whose = top ? Whose::callers : Whose::own;
        const Sequence<const E> y = top ? outside(w, c, read_only(run.y))
                                        : inside(w, c, layout.y(grad.tape, l), y_width(), 0);
        job.y = own_columns(y, whose, job.first ? 0 : -1, R, memory.arena.at(memory.y[p]));
        const Index* const places = even ? nullptr : &marks.rows[w.part.begin];
        S* const chunks = wide_chunks.data() + p * capacity * wide_columns;
        const auto grad_y_of_top = [&]() -> PlacedSequence<const S> {
          const Sequence<const G> all = outside(w, c, grad.grad_y);
          if constexpr (!narrow_grads) return {directed(columns_of(all, R), n, d), places};
          return {all.data ? own_columns(all, whose, 0, R, chunks) : Sequence<const S>{}};
        };
        job.grad_y =
            top ? grad_y_of_top()
                : PlacedSequence<const S>{directed(columns_of(read_only(middle(l, c)), R), n, d)};
        job.tape = kernel_tape(w, c, layout, grad.tape, k, d);
        const Index columns = shape.layer(k).input_size;
        const auto grad_x_of_first = [&]() -> PlacedSequence<S> {
          if constexpr (!narrow_grads) return {outside(w, c, grad.grad_x), places};
          if (!wants_x) return {};
          if (D == 2) return {inside(w, c, wide_x.data(), columns, 0)};
          return {Sequence<S>{chunks + capacity * y_width(), c.rows * columns, columns}};
        };
        const PlacedSequence<S> wanted =
            l == 0 ? grad_x_of_first() : PlacedSequence<S>{middle(l - 1, c)};
        const bool aside = wanted.data && d == 1;
        if (aside) {
          job.grad_x = {{memory.arena.at(memory.grad_x[p]), c.rows * columns, columns}};
        } else {
          job.grad_x = {directed<S>(wanted, n, d), wanted.places};
        }
        job.grad_state = layer_state(shape, state, k, B, w.part.begin);
        job.packed = memory.arena.at(memory.packed[k]);
        job.plain = weights[k];
        job.team = team;
        job.scratch = scratch_of(memory, p, k);
        job.products = part_products();
        job.weights = !(grad.frozen && grad.frozen[k]);
        job.peephole = weights[k].peephole;
        job.options = step_options(w, c, k, d);
        if (top) {
          job.options.grad_c = own_columns(outside(w, c, grad.grad_cells), whose, 0, cells_width(),
                                           memory.arena.at(memory.grad_cells[p]));
        }
        if (restarts()) {
          S* const to = memory.arena.at(memory.restart[p]) + k * state_width();
          job.options.grad_restart = {to, has_cell_state(shape.cell) ? to + R : nullptr};
        }
        char& gathered = memory.gathered[gathered_at(p + team.rank, k)];
        job.fresh = !gathered;
        kernel().reverse(job);
        gathered = gathered || job.weights;
        // Where all directions have come to it, the dropout of the layer below.
        const bool dropping = drops && l > 0 && d == D - 1;
        if (aside || dropping) {
          each(team, n * c.rows, [&](Index i) {
            const Index s = i / c.rows, j = i % c.rows, t = d == 0 ? s : n - 1 - s;
            S* const to = wanted.at(t, j);
            if (aside) {
              const S* const more = job.grad_x.at(s, j);
              for (Index f = 0; f < columns; ++f) to[f] += more[f];
            }
            if (dropping) multiply(columns, mask + (t * c.rows + j) * columns, to, to);
          });
        }
        if constexpr (narrow_grads) {
          if (l > 0 || d < D - 1 || !wants_x) return;
          scatter(w, c, Whose::callers, wanted, 0, columns, 0, outside(w, c, grad.grad_x));
        }
      });
    });
    stop.raise();
  }

  // The state that the block of a chunk begins with, from the tape; rows one behind the other.
  State<const S> start_of(const Walk& w, const Chunk& c, Index k,
                          const TapeLayout<const S, const E>& layout, const S* tape, bool needed,
                          S* to) const {
    const State<const S> kept = layout.start(tape, k, *c.block);
    if (w.part.stride == 1 || !needed) return kept;
    const State<S> own{
        to, has_cell_state(shape.cell) ? to + w.part.rows * shape.output_size() : nullptr};
    if (w.team.rank == 0) {
      copy_rows<S>(
          shape.layer(k), c.rows, kept, [&](Index j) { return w.part.rank(j); }, own,
          [](Index j) { return j; });
    }
    w.team.wait();
    return {own.h, own.c};
  }
};

template <class E>
Session<E>::Session(const StackShape& shape, const Weights<const E>* weights, const Batch& batch,
                    Index longest)
    : data_(std::make_unique<Data>(shape, weights, batch, longest)) {}

template <class E>
Session<E>::~Session() = default;

template <class E>
Index Session<E>::tape_size(Index begin, Index steps) const {
  const Blocks blocks = data_->lengths.blocks(begin, begin + steps);
  return TapeLayout<S, E>{data_->shape, blocks, data_->ragged()}.size();
}

template <class E>
void Session<E>::advance(const Forward<E>& run, Interrupt interrupt) {
  data_->forward(run, nullptr, interrupt);
}

template <class E>
void Session<E>::record(const Forward<E>& run, S* tape, Interrupt interrupt) {
  data_->forward(run, tape, interrupt);
}

template <class E>
template <class G>
void Session<E>::reverse(const Forward<E>& run, const Reverse<S, G>& grad, Interrupt interrupt) {
  data_->reverse(run, grad, interrupt);
}

template <class E>
void Session<E>::finish(const Weights<S>* grad_weights, bool add) {
  const Data& data = *data_;
  const ReverseMemory<S>* const memory = data.reverse_memory.get();
  const Index R = data.shape.output_size();
  for (Index k = 0; k < data.shape.layers(); ++k) {
    const LayerShape layer = data.shape.layer(k);
    const Weights<S>& to = grad_weights[k];
    if (to.w_ih) {
      bool more = add;
      for (std::size_t p = 0; p < data.parts.size(); ++p) {
        if (!memory || !memory->gathered[data.gathered_at(p, k)]) continue;
        data.kernel().reverse_finish(layer, data.scratch_of(*memory, p, k), more, to);
        more = true;
      }
      if (!more) fill_zero(layer, to);
    }
    const S* const learned = data.grad_learned.data() + k * data.state_width();
    if (!add) {
      std::fill_n(to.h0, to.h0 ? R : 0, S(0));
      std::fill_n(to.c0, to.c0 ? data.shape.hidden_size : 0, S(0));
    }
    const auto add_learned = [&](const S* from) {
      for (Index i = 0; i < R && to.h0; ++i) to.h0[i] += from[i];
      for (Index i = 0; i < data.shape.hidden_size && to.c0; ++i) to.c0[i] += from[R + i];
    };
    add_learned(learned);
    for (std::size_t p = 0; p < data.parts.size() && data.reverse_memory && data.restarts(); ++p) {
      add_learned(data.reverse_memory->arena.at(data.reverse_memory->restart[p]) +
                  k * data.state_width());
    }
  }
}

template <class E>
Index Session<E>::nbytes() const {
  return (data_->wide_weights.size() + data_->lay_out_forward().arena.size() +
          data_->lay_out_reverse().arena.size()) *
         Index(sizeof(S));
}

template <class E>
Index tape_size(const StackShape& shape, const Batch& batch) {
  const Lengths lengths(batch);
  const Blocks blocks = lengths.blocks(0, batch.T);
  return TapeLayout<Arithmetic<E>, E>{shape, blocks, lengths.given()}.size();
}

template Index tape_size<float>(const StackShape&, const Batch&);
template Index tape_size<double>(const StackShape&, const Batch&);
template Index tape_size<Bfloat16>(const StackShape&, const Batch&);

template <class S>
void copy_tape_step(const StackShape& shape, Index B, const S* step, S* tape, Index T, Index t) {
  const Blocks one{{}, B, 0}, all{{}, T * B, 0};
  const TapeLayout<const S> from{shape, one, false};
  const TapeLayout<S> to{shape, all, false};
  const Index y_size = B * from.y_width();
  const std::size_t bytes = B * from.width() * (from.narrow() ? sizeof(Bfloat16) : sizeof(S));
  for (Index l = 0; l < shape.num_layers; ++l) {
    // Not by memcpy, which takes no null: a cell may have no tape, and be the only one.
    std::copy_n(reinterpret_cast<const char*>(from.layer(step, l)), bytes,
                reinterpret_cast<char*>(to.layer(tape, l)) + t * bytes);
    if (l == shape.num_layers - 1) break;
    std::copy_n(from.y(step, l), y_size, to.y(tape, l) + t * y_size);
  }
}

template void copy_tape_step(const StackShape&, Index, const float*, float*, Index, Index);
template void copy_tape_step(const StackShape&, Index, const double*, double*, Index, Index);

template class Session<float>;
template class Session<double>;
template class Session<Bfloat16>;
template void Session<float>::reverse(const Forward<float>&, const Reverse<float>&, Interrupt);
template void Session<double>::reverse(const Forward<double>&, const Reverse<double>&, Interrupt);
template void Session<Bfloat16>::reverse(const Forward<Bfloat16>&, const Reverse<float>&,
                                         Interrupt);
template void Session<Bfloat16>::reverse(const Forward<Bfloat16>&, const Reverse<float, Bfloat16>&,
                                         Interrupt);

}  // namespace fastbptt
