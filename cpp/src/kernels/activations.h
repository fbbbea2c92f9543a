// tanh and logistic on packets, with their errors in units in the last place, as tests measure them
// over all of the range where the result is a normal number:
//
//              float32   float64
//   tanh           7         2
//   logistic       4         3
//
// NaN in, NaN out; infinities give the limits.
#pragma once
#include "kernels/packet.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// Eigen's exp and tanh clamp their argument, which turns NaN into a number.
template <class S>
FASTBPTT_INLINE Packet<S> keep_nan(const Packet<S>& x, const Packet<S>& result) {
  return pselect(pcmp_eq(x, x), result, x);
}

template <class S>
FASTBPTT_INLINE Packet<S> logistic(const Packet<S>& x) {
  const Packet<S> one = constant<S>(1);
  const Packet<S> e = Eigen::internal::pexp(Eigen::internal::pnegate(x));
  return keep_nan<S>(x, pdiv(one, padd(one, e)));
}

FASTBPTT_INLINE Packet<float> tanh_of(const Packet<float>& x) {
  return keep_nan<float>(x, Eigen::internal::ptanh(x));
}

// Near zero the rational approximation of Cephes (Moshier), x + x^3 P(x^2) / Q(x^2); beyond it
// 1 - 2 / (exp(2|x|) + 1), which loses nothing there.
FASTBPTT_INLINE Packet<double> tanh_of(const Packet<double>& x) {
  using P = Packet<double>;
  const P one = constant<double>(1), two = constant<double>(2);
  const P size = Eigen::internal::pabs(x);
  const P e = Eigen::internal::pexp(Eigen::internal::pmin(padd(size, size), constant<double>(50)));
  const P far = psub(one, pdiv(two, padd(e, one)));
  const P far_signed = pselect(pcmp_lt(x, constant<double>(0)), Eigen::internal::pnegate(far), far);
  const P z = pmul(x, x);
  P p = pmadd(z, constant<double>(-9.64399179425052238628e-1),
              constant<double>(-9.92877231001918586564e1));
  p = pmadd(z, p, constant<double>(-1.61468768441708447952e3));
  P q = padd(z, constant<double>(1.12811678491632931402e2));
  q = pmadd(z, q, constant<double>(2.23548839060100448583e3));
  q = pmadd(z, q, constant<double>(4.84406305325125486048e3));
  const P near = pmadd(pmul(x, z), pdiv(p, q), x);
  return keep_nan<double>(x, pselect(pcmp_lt(size, constant<double>(0.625)), near, far_signed));
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
