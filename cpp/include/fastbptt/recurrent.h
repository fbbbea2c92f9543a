// The three verbs over a stack of recurrent layers. All arrays belong to the caller.
#pragma once
#include <cstdint>
#include <exception>
#include <memory>

#include "fastbptt/types.h"

namespace fastbptt {

// L layers of D directions: number l * D + d runs forward in time for d = 0 and backward for d = 1.
// A layer takes what all directions of the one below gave, side by side.
struct StackShape {
  Cell cell;
  Index input_size;
  Index hidden_size;
  Index num_layers;
  Index directions = 1;
  double dropout = 0;   // the part of every layer's output, but the last's, that training drops
  Index proj_size = 0;  // of every layer; 0: no projection
  LayerOptions options{};
  MatmulPrecision precision = MatmulPrecision::as_set;
  Index layers() const { return num_layers * directions; }
  LayerShape layer(Index k) const {
    return {cell, k < directions ? input_size : directions * output_size(), hidden_size, proj_size,
            options};
  }
  // Of one direction.
  Index output_size() const { return proj_size > 0 ? proj_size : hidden_size; }
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

// T steps of B >= 1 rows, and what is known of them beside the input.
//   lengths  [B], each from 0 to T: the steps that a row has, null: all. The work, and the tape,
//   are
//            those of the steps that are there; behind them y and dL/dx are zero, and the final
//            state of a row is that after its last step.
//   packed   the sequences have no padding: a step has the rows that are there, in the order of
//            their lengths, and begins where the one before ends. Only with lengths that never
//            rise.
//   seed     of what training draws; null: nothing is dropped, and zoneout is its expectation.
//   begin    the first step of all that the session is for
//   resets   [T - begin, B], from that step on: whether a row begins anew before the step, with the
//            learned state or zeros; no gradient goes across. Backward in time the same steps are
//            kept apart from each other. Null: never.
//   mask     the same: whether a row has the step; where not, its state is carried over and x is
//            not looked at. Null: always.
struct Batch {
  Index T;
  Index B;
  const Index* lengths = nullptr;
  bool packed = false;
  const std::uint64_t* seed = nullptr;
  Index begin = 0;
  const bool* resets = nullptr;
  const bool* mask = nullptr;
};

// Elements of the tape of a whole batch with x and y of type E: the layers' own tapes, y of all
// layers but the last, and, with lengths, the states where the number of rows changes. They are of
// type Arithmetic<E>, and for float and double equally many.
template <class E = float>
Index tape_size(const StackShape& shape, const Batch& batch);
template <class E = float>
Index tape_size(const StackShape& shape, Index T, Index B) {
  return tape_size<E>(shape, Batch{T, B});
}

// Puts the tape of one step into the tape of T steps as its step t; of one direction.
template <class S>
void copy_tape_step(const StackShape& shape, Index B, const S* step, S* tape, Index T, Index t);

// Some steps of a sequence: n >= 0 of them, of all B rows. D*H is the width of y, D*P with a
// projection.
//   x      [n, B, I]; may be null if n is 0
//   y      [n, B, D*H]; must not overlap x
//   initial, final  [L*D, B, H], h with P; initial.h null: the learned state, or zeros; may not
//          overlap
//   begin  the step of the sequence that they begin with; with two directions 0, and n is T
//   cells  [n, B, D*H], every c of the last layer; data null: not wanted
// E is the type of x and y, float, double or Bfloat16; h is then rounded to what bfloat16 has
// wherever it is made, and initial.h must be so.
template <class E>
struct Forward {
  using S = Arithmetic<E>;
  Index steps;
  Sequence<const E> x;
  State<const S> initial;
  Sequence<E> y;
  State<S> final;
  Index begin = 0;
  Sequence<S> cells{};
};

// The gradient, back through the steps of a Forward, whose x, y and tape are as record left them.
//   grad_y      [n, B, D*H], data null: zeros
//   grad_final  [L*D, B, H], null: zeros
//   grad_x      [n, B, I], data null: not computed
//   grad_initial  [L*D, B, H], written
//   grad_cells  [n, B, D*H], data null: zeros
//   frozen  one a layer, whether its weight gradients are left out; null: none are
// G is the type of grad_y and grad_x: S, or Bfloat16 where x is that, and grad_x is then rounded.
template <class S, class G = S>
struct Reverse {
  const S* tape;
  Sequence<const G> grad_y;
  State<const S> grad_final;
  Sequence<G> grad_x;
  State<S> grad_initial;
  const bool* frozen = nullptr;
  Sequence<const S> grad_cells{};
};

// The verbs over one sequence, as a whole or cut into parts of at most `longest` steps. What does
// not change from part to part is made once: the packed weights, the way the work is shared out,
// and the sums of the weight gradients, which go on from part to part. So where a sequence is cut
// does not change a bit, as long as it is reversed from its end to its beginning. Memory is taken
// when a verb first needs it. The weights must stay where and as they are. One call at a time;
// after an Interrupted the gradients are lost. With x, y and weights in bfloat16 all arithmetic and
// the gradients of weights and states are float's, as if h were not rounded.
template <class E>
class Session {
 public:
  using S = Arithmetic<E>;
  // weights: one a layer. What the batch points to is read here only.
  Session(const StackShape& shape, const Weights<const E>* weights, const Batch& batch,
          Index longest);
  Session(const StackShape& shape, const Weights<const E>* weights, const Batch& batch)
      : Session(shape, weights, batch, batch.T) {}
  ~Session();

  // Elements of the tape of these steps.
  Index tape_size(Index begin, Index steps) const;

  // y and the final state; keeps nothing.
  void advance(const Forward<E>& run, Interrupt interrupt = {});
  // y, the final state, and the tape.
  void record(const Forward<E>& run, S* tape, Interrupt interrupt = {});
  // grad_x and grad_initial; gathers the weight gradients.
  template <class G = S>
  void reverse(const Forward<E>& run, const Reverse<S, G>& grad, Interrupt interrupt = {});
  // Writes the weight gradients that were gathered, one a layer, or adds them to what is there;
  // null biases and learned states are skipped, and layers with a null w_ih. Once, at the end.
  void finish(const Weights<S>* grad_weights, bool add = false);

  // Bytes that all the verbs together take for themselves.
  Index nbytes() const;

 private:
  struct Data;
  std::unique_ptr<Data> data_;
};

}  // namespace fastbptt
