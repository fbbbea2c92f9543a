// What an instruction set gives: plain functions over raw pointers and strides, one table an ISA.
// No Eigen type crosses this line, and nothing here allocates.
#pragma once
#include <cstdint>

#include "fastbptt/random.h"
#include "fastbptt/types.h"
#include "kernels/part_products.h"

namespace fastbptt {

// Threads that share one job: each has its own panels, and all wait for each other where one needs
// what another made. The order of every sum is the same for any size of the team.
struct Team {
  int rank = 0;
  int size = 1;
  void (*barrier)(void*) = nullptr;
  void* data = nullptr;

  __attribute__((always_inline)) void wait() const {
    if (size > 1) barrier(data);
  }
  // This thread's share of [0, n).
  __attribute__((always_inline)) Index begin(Index n) const { return n * rank / size; }
  __attribute__((always_inline)) Index end(Index n) const { return n * (rank + 1) / size; }
};

// Zoneout's draws of a run of steps of one layer.
struct Zoneout {
  double h = 0;  // the probability that a unit keeps its h
  double c = 0;
  const std::uint64_t* seed = nullptr;  // null: the expectation
  Index layer = 0;
  Index step =
      0;  // of the whole sequence, of the run's step 0, and from one of its steps to the next
  Index step_by = 1;
  const Index* rows = nullptr;  // of the batch as the caller ordered it, of each of the run's
};

// What a layer does in a run of steps beside its cell's own formula. What is null it does not do.
template <class S>
struct StepOptions {
  // [steps, batch]: whether the state before the step is that of `restart` instead.
  Sequence<const bool> resets;
  State<const S> restart;  // h [H or P] and c [H], null: zeros
  State<S> grad_restart;   // the same, added to; null: not wanted
  // [steps, batch]: whether there is a step; else the state is carried over.
  Sequence<const bool> mask;
  const S* recurrent_mask = nullptr;  // [batch, H or P]: what h' is multiplied by before W_hh
  Zoneout zoneout;
  Sequence<S> c;             // [steps, batch, H]: every c, written by forward
  Sequence<const S> grad_c;  // the same: its gradient

  bool any() const {
    return resets.data || mask.data || recurrent_mask || zoneout.h > 0 || zoneout.c > 0 || c.data ||
           grad_c.data;
  }
};

// The tape of a run of steps, [steps, batch, tape_width * H]: of S, or narrow. At most one has
// data.
template <class S>
struct Tape {
  Sequence<S> wide;
  Sequence<Narrow<S>> narrow;
};

// A run of consecutive steps of one layer for some rows of the batch.
template <class S>
struct ForwardJob {
  LayerShape shape;
  Index steps;
  Index batch;
  Sequence<const S> x;  // [steps, batch, I]
  Sequence<S> y;        // [steps, batch, H or P]
  Tape<S> tape;         // no data: keep nothing
  State<S> state;       // h [batch, H or P] and c [batch, H], in and out
  const S* packed;      // by forward_pack; null: the weights as they are, for very few rows
  Weights<const S> weights;
  Team team;
  S* scratch;                              // forward_scratch elements
  const PartProducts* products = nullptr;  // where the shape has parts
  StepOptions<S> options{};
  bool narrow_y = false;  // whether y is rounded to what bfloat16 has; of float only
};

// One whose row b lies in place places[b]; null: in place b.
template <class S>
struct PlacedSequence : Sequence<S> {
  const Index* places = nullptr;
  S* at(Index t, Index b = 0) const { return Sequence<S>::at(t, places ? places[b] : b); }
};

template <class S>
struct ReverseJob {
  LayerShape shape;
  Index steps;
  Index batch;
  bool first;  // no step before these; else y and tape may be read at step -1
  State<const S>
      initial;  // as in ForwardJob, the state before step 0, read where first; null h: zeros
  Sequence<const S> x;  // as in ForwardJob
  Sequence<const S> y;
  Tape<const S> tape;
  PlacedSequence<const S> grad_y;  // data null: zeros
  PlacedSequence<S> grad_x;        // data null: not asked for
  State<S> grad_state;             // like the state, in: after the last step, out: before the first
  const S* packed;                 // by reverse_pack, from these weights
  Weights<const S> plain;
  const S* peephole;  // [P, H], null: none
  Team team;
  S* scratch;           // reverse_scratch elements, begun
  bool fresh;           // the first run since then: nothing has been gathered yet
  bool weights = true;  // whether the weight gradients are wanted
  const PartProducts* products = nullptr;
  StepOptions<S> options{};
};

// Sizes are in elements; memory belongs to the caller and is aligned to 64 bytes. Packed weights
// are shared by all threads; scratch is one thread's, and keeps its weight gradients from job to
// job.
template <class S>
struct LayerKernels {
  Index (*forward_packed)(const LayerShape&);
  void (*forward_pack)(const LayerShape&, const Weights<const S>&, S* packed);
  Index (*forward_scratch)(const LayerShape&, Index steps, Index batch, int team);
  void (*forward)(const ForwardJob<S>&);

  Index (*reverse_packed)(const LayerShape&);
  void (*reverse_pack)(const LayerShape&, const Weights<const S>&, S* packed);
  Index (*reverse_scratch)(const LayerShape&, Index steps, Index batch, int team);
  void (*reverse_begin)(const LayerShape&, S* scratch);
  void (*reverse)(const ReverseJob<S>&);
  // Writes the weight gradients that the scratch has gathered since reverse_begin to `grad`, or
  // adds them.
  void (*reverse_finish)(const LayerShape&, const S* scratch, bool add, const Weights<S>& grad);

  // draw_mask of fastbptt/random.h.
  void (*draw_mask)(std::uint64_t key, const Place& place, double p, S kept, Index n, S* mask);
};

// The readout y = x W^T + b over rows of [N, K] weights. `packed` memory has the panels of W and b;
// `columns` those of W for the way back; `sums` are y or dL/dy in panels, with room for `stride`
// rows. Gradients are gathered in panels like `packed`, the last row first.
template <class S>
struct RowsKernels {
  Index (*packed)(Index K, Index N);
  void (*pack)(Index K, Index N, const S* weight, const S* bias, S* packed);
  void (*unpack)(Index K, Index N, const S* packed, S* weight, S* bias);
  Index (*columns)(Index K, Index N);
  void (*pack_columns)(Index K, Index N, const S* weight, S* columns);
  Index (*sums)(Index N, Index stride);
  Index (*panels)(Index N);

  // sums of rows [row, row + n) from x [n, K]
  void (*multiply)(Index K, Index N, Index row, Index n, Index stride, const S* x, const S* packed,
                   S* sums);
  // Rows [row, row + n) of the sums to y, whose rows are `step` apart, and back with zeros in the
  // lanes behind N.
  void (*read)(Index N, Index row, Index n, Index stride, const S* sums, S* y, Index step);
  void (*write)(Index N, Index row, Index n, Index stride, const S* y, Index step, S* sums);
  // grad_x [n, K] of rows [row, row + n); scratch has room for n * 4 packets.
  void (*grad_x)(Index K, Index N, Index row, Index n, Index stride, const S* sums,
                 const S* columns, S* scratch, S* grad_x);
  // Panels [begin, end) of the gradient of the weight, columns [from, to), and of the bias where
  // that is from the first column on; from rows [0, n), x [n, K].
  void (*add_gradient)(Index K, Index N, Index n, Index stride, const S* x, const S* sums,
                       Index begin, Index end, Index from, Index to, S* gradient);
  Index lanes;

  // y [n, N] without packing, for very few rows.
  void (*multiply_directly)(Index K, Index N, Index n, const S* x, const S* weight, const S* bias,
                            S* y);
  // Overwrites logits [rows, N], rows `step` apart and all aligned alike, with scale * (softmax -
  // one-hot), rows of zeros where target is ignore; returns the sum of the cross entropies, not
  // scaled.
  double (*cross_entropy)(Index rows, Index N, S* logits, Index step, const std::int64_t* target,
                          std::int64_t ignore, double scale);
};

// Values of one type from those of the other, the nearest where there are fewer of them.
struct Bfloat16Kernels {
  void (*widen)(const Bfloat16* from, Index n, float* to);
  void (*narrow)(const float* from, Index n, Bfloat16* to);
};

struct KernelTable {
  int vector_bytes;
  const LayerKernels<float>* layer_f32;
  const LayerKernels<double>* layer_f64;
  RowsKernels<float> rows_f32;
  RowsKernels<double> rows_f64;
  Bfloat16Kernels bfloat16;
  template <class S>
  const LayerKernels<S>& layer() const;
  template <class S>
  const RowsKernels<S>& rows() const;
};

template <>
inline const LayerKernels<float>& KernelTable::layer<float>() const {
  return *layer_f32;
}
template <>
inline const LayerKernels<double>& KernelTable::layer<double>() const {
  return *layer_f64;
}
template <>
inline const RowsKernels<float>& KernelTable::rows<float>() const {
  return rows_f32;
}
template <>
inline const RowsKernels<double>& KernelTable::rows<double>() const {
  return rows_f64;
}

}  // namespace fastbptt
