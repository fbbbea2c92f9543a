// Linear readout and softmax cross entropy over a block of rows.
#pragma once
#include <Eigen/Core>
#include <cmath>

#include "kernels/kernel_table.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class S>
using Rows = Eigen::Map<const Matrix<S>, 0, Eigen::OuterStride<>>;
template <class S>
using MutableRows = Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>>;
template <class S>
using Row = Eigen::Map<const Eigen::Array<S, 1, Eigen::Dynamic>>;
template <class S>
using MutableRow = Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>>;

template <class S>
Rows<S> rows(const S* data, Index n, Index columns, Index stride) {
  return Rows<S>(data, n, columns, Eigen::OuterStride<>(stride));
}
template <class S>
MutableRows<S> mutable_rows(S* data, Index n, Index columns, Index stride) {
  return MutableRows<S>(data, n, columns, Eigen::OuterStride<>(stride));
}

template <class S>
void linear(const RowsJob<S>& job, S* y) {
  auto out = mutable_rows(y, job.rows, job.N, job.N);
  out.noalias() =
      rows(job.x, job.rows, job.K, job.K) * rows(job.weight, job.N, job.K, job.K).transpose();
  if (job.bias) out.rowwise() += Row<S>(job.bias, job.N).matrix();
}

template <class S>
void linear_backward(const RowsJob<S>& job, const S* grad_y, S* grad_x, S* grad_weight,
                     S* grad_bias) {
  const Rows<S> grad = rows(grad_y, job.rows, job.N, job.N);
  mutable_rows(grad_x, job.rows, job.K, job.K).noalias() =
      grad * rows(job.weight, job.N, job.K, job.K);
  mutable_rows(grad_weight, job.N, job.K, job.K).noalias() +=
      grad.transpose() * rows(job.x, job.rows, job.K, job.K);
  if (!grad_bias) return;
  // Row by row: Eigen's sum of columns goes by the alignment of its result.
  MutableRow<S> sum(grad_bias, job.N);
  for (Index r = 0; r < job.rows; ++r) sum += Row<S>(grad_y + r * job.N, job.N);
}

// -log softmax(l)[k] = log(sum of exp(l - m)) + m - l[k], with m the largest, so that exp is at
// most 1.
template <class S>
double cross_entropy(Index n, Index N, S* logits, const std::int64_t* target, std::int64_t ignore,
                     double scale) {
  double sum = 0;
  for (Index r = 0; r < n; ++r) {
    MutableRow<S> row(logits + r * N, N);
    if (target[r] == ignore) {
      row.setZero();
      continue;
    }
    const S largest = row.maxCoeff();
    const S wanted = row[target[r]];
    row = (row - largest).exp();
    const S total = row.sum();
    sum += std::log(double(total)) + double(largest) - double(wanted);
    row *= S(scale) / total;
    row[target[r]] -= S(scale);
  }
  return sum;
}

template <class S>
constexpr RowsKernels<S> rows_kernels() {
  return {&linear<S>, &linear_backward<S>, &cross_entropy<S>};
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
