// The one vector language of the kernels: Eigen's packets of the instruction set in compilation.
#pragma once
#include <Eigen/Core>

#include "fastbptt/types.h"

#ifndef FASTBPTT_INLINE
#define FASTBPTT_INLINE __attribute__((always_inline)) inline
#endif

namespace fastbptt {
namespace FASTBPTT_ISA {

using Eigen::internal::padd;
using Eigen::internal::pcmp_eq;
using Eigen::internal::pcmp_lt;
using Eigen::internal::pdiv;
using Eigen::internal::pmadd;
using Eigen::internal::pmul;
using Eigen::internal::pselect;
using Eigen::internal::pset1;
using Eigen::internal::psub;

template <class S>
using Packet = typename Eigen::internal::packet_traits<S>::type;

template <class S>
constexpr Index lanes = Eigen::internal::unpacket_traits<Packet<S>>::size;

// Rows of a register tile of Q packets a row: as many as leave room for the operands. Without a
// fused multiply-add each product needs a register of its own.
#if defined(EIGEN_VECTORIZE_FMA) || defined(EIGEN_VECTORIZE_NEON)
constexpr bool has_fma = true;
#else
constexpr bool has_fma = false;
#endif
constexpr int most_tile_rows = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32 ? 8 : 6;
constexpr int tile_rows(Index Q) {
  const int accumulators = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32 ? 24 : has_fma ? 12 : 9;
  const int rows = accumulators / static_cast<int>(Q);
  return rows < most_tile_rows ? rows : most_tile_rows;
}
// A tile of four packets and three rows leaves remainders of two, which take nearly as long as
// three. Twice two packets of up to six rows leave better ones.
constexpr int tall_tile_rows = tile_rows(4) == 3 ? 6 : 0;
static_assert(tall_tile_rows <= most_tile_rows && tall_tile_rows <= tile_rows(2), "registers");

template <class S>
FASTBPTT_INLINE Packet<S> load(const S* from) {
  return Eigen::internal::ploadu<Packet<S>>(from);
}

template <class S>
FASTBPTT_INLINE void store(S* to, const Packet<S>& value) {
  Eigen::internal::pstoreu(to, value);
}

// The first n <= lanes values; the other lanes are zero. n is all of them but at the edge of an odd
// size, so the branch is predicted.
template <class S>
FASTBPTT_INLINE Packet<S> load(const S* from, Index n) {
  if (n == lanes<S>) return load(from);
  alignas(64) S values[lanes<S>] = {};
  for (Index i = 0; i < n; ++i) values[i] = from[i];
  return load(values);
}

template <class S>
FASTBPTT_INLINE void store(S* to, const Packet<S>& value, Index n) {
  if (n == lanes<S>) return store(to, value);
  alignas(64) S values[lanes<S>];
  store(values, value);
  for (Index i = 0; i < n; ++i) to[i] = values[i];
}

template <class S>
FASTBPTT_INLINE Packet<S> constant(double value) {
  return pset1<Packet<S>>(S(value));
}

FASTBPTT_INLINE Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
