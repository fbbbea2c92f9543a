// Learning while the data arrives: B parallel streams, a step at a time, with memory and time a
// step that do not depend on how many steps there were.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "fastbptt/recurrent.h"

namespace fastbptt {

// How the error of a step reaches the steps before it.
//   truncated  backwards, at most k2 steps (Williams & Peng 1990); any stack
//   rtrl       forwards and exact (Williams & Zipser 1989); like those below for one layer
//   snap1      forwards, the influence on the own unit (Menick et al. 2020)
//   eprop      forwards, without the recurrent weights (Bellec et al. 2020); LSTM
//   uoro       forwards, a random product of two vectors (Tallec & Ollivier 2017)
enum class Rule { truncated, rtrl, snap1, eprop, uoro };

struct OnlineOptions {
  Rule rule;
  Index k1;            // truncated: steps between two gathers
  Index k2;            // truncated: steps that a gradient reaches back
  std::uint64_t seed;  // uoro
};

// B streams through a stack. The weights must stay where they are; they may change between two
// steps. `classes` is V of an embedding, whose gradient is then wanted, or 0.
struct OnlineShape {
  StackShape stack;
  Index B;
  Index classes;
};

// A piece of all that goes on from step to step, for saving it.
struct OnlineField {
  enum class Kind { scalar, real, integer, byte };  // S, double, int64, uint8
  const char* name;
  Kind kind;
  void* data;
  Index size;
};

template <class S>
class OnlineLearner {
 public:
  virtual ~OnlineLearner() = default;

  // Tries a step, and changes nothing that counts. x [B, I]; classes [B], which the embedding made
  // x of, or null; present [B]: rows of zero bytes have no input, and their state stays as it is.
  // y [B, H].
  virtual void attempt(const S* x, const std::int64_t* classes, const std::uint8_t* present,
                       S* y) = 0;
  // Takes the step that was tried last. grad_y [B, H] is the error of y; null: none.
  virtual void keep(const S* grad_y) = 0;
  // Adds the gradients of the steps since the last gather; one Weights a layer, embedding [V, I].
  virtual void gather(const Weights<S>* grads, S* grad_embedding) = 0;
  // Begins the streams with a byte in rows [B] anew: no error reaches back beyond.
  virtual void reset(const std::uint8_t* rows) = 0;
  virtual std::vector<OnlineField> fields() = 0;
  // After fields were written from outside: the name of one whose values cannot be, or null.
  virtual const char* damaged() const { return nullptr; }
};

template <class S>
std::unique_ptr<OnlineLearner<S>> new_online_learner(const OnlineShape& shape,
                                                     const Weights<const S>* weights,
                                                     const OnlineOptions& options);

}  // namespace fastbptt
