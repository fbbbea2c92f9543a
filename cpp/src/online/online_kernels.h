// What an instruction set gives to the rules that run forward in time: plain functions over raw
// pointers for one step of one stream through one layer. Nothing here allocates.
//
// The parameters of a layer stand in one order everywhere: a row of C values for each row of the
// gates, C = I + H, or I + H + 2 with biases: the columns of W_ih, b_ih, the columns of W_hh, b_hh.
// Behind them, where there is an embedding, its V rows of I values.
#pragma once
#include <cstdint>

#include "fastbptt/types.h"

namespace fastbptt {

// What one step did, as derivatives. Each array has a packet of room behind its end.
//   own, keep, through_c  [H]   dh/dh' apart from what goes through W_hh, dc/dc', dh/dc'
//   h_by_x, h_by_h, c_by  [G*H] dh and dc by what the input side and the recurrent side of the sum
//                               of each gate add to it, of the same unit; c for the LSTM only
//   input, candidate      [C]   what the parameters of a gate were multiplied with: x, 1, h', 1;
//                               in a GRU with the reset before, r h' for the candidate's
//   reset, slope          [H]   of that GRU: r, and h' r (1 - r)
template <class S>
struct Derivatives {
  S* own;
  S* keep;
  S* through_c;
  S* h_by_x;
  S* h_by_h;
  S* c_by;
  S* input;
  S* candidate;
  S* reset;
  S* slope;
};

template <class S>
struct StepJob {
  LayerShape shape;
  Weights<const S> weights;
  const S* x;  // [I]
  State<const S> before;
  State<S> after;  // a packet of room behind the end
  Derivatives<S> d;
  S* scratch;  // 2*G*H and a packet
};

// The derivatives of the whole state by h': [H, H] of h, for the LSTM before them those of c.
template <class S>
struct JacobianJob {
  LayerShape shape;
  Weights<const S> weights;
  Derivatives<S> d;
  S* jacobian;
  S* embedded;  // in the same order, the derivatives by x [H, I]; null: not wanted
  S* scratch;   // H * max(H, I)
};

// The influence of every parameter on every unit, [units, parameters], in panels of four packets of
// parameters. J = D J' + (the direct influence); with the error: grads += grad_h J.
template <class S>
struct InfluenceJob {
  LayerShape shape;
  Weights<const S> weights;
  Derivatives<S> d;
  bool moved;         // whether there was a step; else there is only an error
  const S* jacobian;  // of JacobianJob
  const S* embedded;  // of JacobianJob
  Index row;          // of the embedding; negative: none
  S* h;               // panels [H][width]
  S* c;
  const S* grad_h;   // [H]; null: none
  S* grads;          // in panels
  Index parameters;  // without padding
  Index begin, end;  // panels
  S* scratch;        // 2 * H * panel_width values
};

// One number a parameter and state of its own unit: J = diag(D) J' + (the direct influence).
template <class S>
struct TraceJob {
  LayerShape shape;
  Weights<const S> weights;
  Derivatives<S> d;
  bool moved;
  bool recurrent;   // whether D has the diagonal of what goes through W_hh
  S* h;             // [G*H, C]
  S* c;             // LSTM
  const S* grad_h;  // [H]; null: none
  S* grads;         // [G*H, C]
  S* scratch;       // 2 * H
};

// grads += dL/dx, by x of this step alone.
template <class S>
struct InputJob {
  LayerShape shape;
  Weights<const S> weights;
  Derivatives<S> d;
  const S* grad_h;
  S* grads;    // [I]
  S* scratch;  // G*H
};

// A product of two vectors in place of the influence: state [H] (and [H]) times parameters.
template <class S>
struct RankOneJob {
  LayerShape shape;
  Weights<const S> weights;
  Derivatives<S> d;
  bool moved;
  const S* signs;  // [H], LSTM [2H]: h, then c
  S* h;            // [H]
  S* c;            // [H], LSTM
  S* parameters;   // [G*H*C + V*I]
  Index size;      // of parameters
  Index row;       // of the embedding; negative: none
  double* norm;    // of parameters
  const S* grad_h;
  S* grads;    // like parameters
  S* scratch;  // (3*G + 3) * H + I
};

template <class S>
struct OnlineKernels {
  void (*step)(const StepJob<S>&);
  void (*jacobian)(const JacobianJob<S>&);
  Index panel_width;
  void (*influence)(const InfluenceJob<S>&);
  void (*trace)(const TraceJob<S>&);
  void (*input)(const InputJob<S>&);
  void (*rank_one)(const RankOneJob<S>&);
};

struct OnlineTable {
  OnlineKernels<float> f32;
  OnlineKernels<double> f64;
};

}  // namespace fastbptt
