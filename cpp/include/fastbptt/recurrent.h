// The three verbs over a stack of recurrent layers. All arrays belong to the caller.
#pragma once
#include <exception>

#include "fastbptt/types.h"

namespace fastbptt {

struct StackShape {
  Cell cell;
  Index input_size;
  Index hidden_size;
  Index num_layers;
  LayerShape layer(Index l) const { return {cell, l == 0 ? input_size : hidden_size, hidden_size}; }
};

// Asked now and then by the calling thread during a long call; true stops the work with
// Interrupted.
struct Interrupt {
  bool (*poll)(void*) = nullptr;
  void* data = nullptr;
};

struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

// Elements that the tape of one record takes: the layers' own tapes, and y of all layers but the
// last.
Index tape_size(const StackShape& shape, Index T, Index B);

// One run of a stack over T >= 0 steps of B >= 1 rows.
//   x      [T, B, I]; may be null if T is 0
//   y      [T, B, H]; must not overlap x
//   initial, final  [L, B, H]; initial.h null: zeros; initial and final may not overlap
template <class S>
struct Forward {
  StackShape shape;
  const Weights<const S>* weights;  // one a layer
  Index T;
  Index B;
  Sequence<const S> x;
  State<const S> initial;
  Sequence<S> y;
  State<S> final;
};

// y and the final state; keeps nothing.
template <class S>
void advance(const Forward<S>& run, Interrupt interrupt = {});

// y, the final state, and the tape (tape_size elements).
template <class S>
void record(const Forward<S>& run, S* tape, Interrupt interrupt = {});

// The gradient, back through the steps of `run`, whose x, y, weights and tape are as record left
// them.
//   grad_y      [T, B, H], data null: zeros
//   grad_final  [L, B, H], null: zeros
//   grad_x      [T, B, I], data null: not computed
//   grad_initial  [L, B, H], written
//   grad_weights  one a layer, added to; null biases are skipped, and with a null w_ih the layer's
//                 weight gradients are not computed at all
template <class S>
struct Reverse {
  const S* tape;
  Sequence<const S> grad_y;
  State<const S> grad_final;
  Sequence<S> grad_x;
  State<S> grad_initial;
  const Weights<S>* grad_weights;
};

template <class S>
void reverse(const Forward<S>& run, const Reverse<S>& grad, Interrupt interrupt = {});

}  // namespace fastbptt
