// The three verbs over a stack of recurrent layers. All arrays belong to the caller.
#pragma once
#include <exception>
#include <memory>

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

// Puts the tape of one step into the tape of T steps as its step t.
template <class S>
void copy_tape_step(const StackShape& shape, Index B, const S* step, S* tape, Index T, Index t);

// Some steps of a sequence: n >= 0 of them, of all B rows.
//   x      [n, B, I]; may be null if n is 0
//   y      [n, B, H]; must not overlap x
//   initial, final  [L, B, H]; initial.h null: zeros; initial and final may not overlap
template <class S>
struct Forward {
  Index steps;
  Sequence<const S> x;
  State<const S> initial;
  Sequence<S> y;
  State<S> final;
};

// The gradient, back through the steps of a Forward, whose x, y and tape are as record left them.
//   grad_y      [n, B, H], data null: zeros
//   grad_final  [L, B, H], null: zeros
//   grad_x      [n, B, I], data null: not computed
//   grad_initial  [L, B, H], written
//   frozen  one a layer, whether its weight gradients are left out; null: none are
template <class S>
struct Reverse {
  const S* tape;
  Sequence<const S> grad_y;
  State<const S> grad_final;
  Sequence<S> grad_x;
  State<S> grad_initial;
  const bool* frozen = nullptr;
};

// The verbs over one sequence of T steps of B >= 1 rows, as a whole or cut into parts of at most
// `longest` steps. What does not change from part to part is made once: the packed weights, the
// way the work is shared out, and the sums of the weight gradients, which go on from part to part.
// So where a sequence is cut does not change a bit, as long as it is reversed from its end to its
// beginning. Memory is taken when a verb first needs it. The weights must stay where and as they
// are. One call at a time; after an Interrupted the gradients are lost.
template <class S>
class Session {
 public:
  // weights: one a layer.
  Session(const StackShape& shape, const Weights<const S>* weights, Index T, Index B,
          Index longest);
  Session(const StackShape& shape, const Weights<const S>* weights, Index T, Index B)
      : Session(shape, weights, T, B, T) {}
  ~Session();

  // y and the final state; keeps nothing.
  void advance(const Forward<S>& run, Interrupt interrupt = {});
  // y, the final state, and the tape: tape_size(shape, run.steps, B) elements.
  void record(const Forward<S>& run, S* tape, Interrupt interrupt = {});
  // grad_x and grad_initial; gathers the weight gradients.
  void reverse(const Forward<S>& run, const Reverse<S>& grad, Interrupt interrupt = {});
  // Adds the weight gradients that were gathered, one a layer; null biases are skipped, and layers
  // with a null w_ih. Once, at the end.
  void finish(const Weights<S>* grad_weights);

  // Bytes that all the verbs together take for themselves.
  Index nbytes() const;

 private:
  struct Data;
  std::unique_ptr<Data> data_;
};

}  // namespace fastbptt
