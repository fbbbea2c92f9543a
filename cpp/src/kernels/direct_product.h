// Products with the weights as they are, for runs of so few rows that packing would cost more than
// all the work: dot products along the rows of the weight, a packet of rows at a time.
#pragma once
#include "kernels/packet.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// Lane i: the sum over k of weight[i * K + k] * a[k], for i < n <= lanes; zero in the others.
template <class S>
__attribute__((noinline)) Packet<S> dots(const S* weight, Index n, const S* a, Index K) {
  constexpr Index p = lanes<S>;
  Eigen::internal::PacketBlock<Packet<S>, int(p)> sums;
  alignas(64) S rest[p] = {};
  for (Index i = 0; i < p; ++i) sums.packet[i] = constant<S>(0);
  Index k = 0;
  if (n == p) {
    for (; k + p <= K; k += p) {
      const Packet<S> value = load(a + k);
#pragma GCC unroll 16
      for (Index i = 0; i < p; ++i) {
        sums.packet[i] = pmadd(load(weight + i * K + k), value, sums.packet[i]);
      }
    }
  }
  for (Index i = 0; k < K && i < n; ++i) {
    for (Index j = k; j < K; ++j) rest[i] += weight[i * K + j] * a[j];
  }
  Eigen::internal::ptranspose(sums);
  Packet<S> sum = load(rest);
#pragma GCC unroll 16
  for (Index i = 0; i < p; ++i) sum = padd(sum, sums.packet[i]);
  return sum;
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
