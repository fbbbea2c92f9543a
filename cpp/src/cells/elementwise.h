// Element-wise functions that the cells share, on rows of H values.
#pragma once
#include <Eigen/Core>

#include "fastbptt/types.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
using Row = Eigen::Map<const Eigen::Array<S, 1, Eigen::Dynamic>>;
template <class S>
using MutableRow = Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>>;

// 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2, which no x can overflow.
template <class A>
void logistic_in_place(A&& x) {
  using S = typename std::decay_t<A>::Scalar;
  x = S(0.5) + S(0.5) * (S(0.5) * x).tanh();
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
