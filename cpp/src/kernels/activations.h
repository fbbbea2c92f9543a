// tanh and logistic on packets, with their errors in units in the last place, as tests measure them
// wherever the result is a normal number:
//
//              float32   float64
//   tanh           7         2
//   logistic       4         3
//
// NaN in, NaN out.
#pragma once
#include "kernels/packet.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// exp(x) for x in [-87, 88], and its value at the nearer end beyond: with n = round(x / ln 2) and
// r = x - n ln 2, 2^n (1 + r + r^2 P(r)), the polynomial of Cephes' expf (Moshier). Rounding by a
// large constant leaves n in the low bits, where a shift makes 2^n of it. Eigen's own exp also
// serves the denormal results, at a higher price. The product with 2^n keeps a NaN. Polynomials are
// summed in pairs (Estrin): with few rows a step waits for their chain of operations.
FASTBPTT_INLINE Packet<float> exp_of(const Packet<float>& x) {
  using P = Packet<float>;
  using I = typename Eigen::internal::unpacket_traits<P>::integer_packet;
  const P y =
      Eigen::internal::pmax(Eigen::internal::pmin(x, constant<float>(88)), constant<float>(-87));
  const P round = constant<float>(12582912.0 + 127.0);  // 1.5 * 2^23, and the exponent's bias
  const P shifted = pmadd(y, constant<float>(1.44269504088896341), round);
  const P n = psub(shifted, round);
  P r = pmadd(n, constant<float>(-0.693359375), y);
  r = pmadd(n, constant<float>(2.12194440e-4), r);
  const P r2 = pmul(r, r);
  const P low = pmadd(r, constant<float>(1.6666665459e-1), constant<float>(5.0000001201e-1));
  const P middle = pmadd(r, constant<float>(8.3334519073e-3), constant<float>(4.1665795894e-2));
  const P high = pmadd(r, constant<float>(1.9875691500e-4), constant<float>(1.3981999507e-3));
  P p = pmadd(pmadd(high, r2, middle), r2, low);
  p = padd(pmadd(p, r2, r), constant<float>(1));
  const I bits = Eigen::internal::preinterpret<I>(shifted);
  const P power = Eigen::internal::preinterpret<P>(Eigen::internal::plogical_shift_left<23>(bits));
  return pmul(p, power);
}

// Eigen clamps the argument, which turns NaN into a number.
FASTBPTT_INLINE Packet<double> exp_of(const Packet<double>& x) {
  return pselect(pcmp_eq(x, x), Eigen::internal::pexp(x), x);
}

template <class S>
FASTBPTT_INLINE Packet<S> logistic(const Packet<S>& x) {
  const Packet<S> one = constant<S>(1);
  return pdiv(one, padd(one, exp_of(Eigen::internal::pnegate(x))));
}

// x + x^3 P(x^2) over Q(x^2), with the coefficients of Eigen's tanh after version 3.4. At the clamp
// it is 1, with and without fused multiply-adds, and before it never more.
FASTBPTT_INLINE Packet<float> tanh_of(const Packet<float>& x) {
  using P = Packet<float>;
  const P end = constant<float>(8.04625988), one = constant<float>(1);
  const P y = Eigen::internal::pmax(Eigen::internal::pmin(x, end), Eigen::internal::pnegate(end));
  const P z = pmul(y, y), z2 = pmul(z, z);
  P p = pmadd(z, constant<float>(3.520756727e-3), constant<float>(1.340216100e-1));
  p = pmadd(z2, pmadd(z, constant<float>(1.394553628e-8), constant<float>(2.102733560e-5)), p);
  P q = pmadd(z, constant<float>(2.597254514e-2), constant<float>(4.673548340e-1));
  q = pmadd(z2, pmadd(z, constant<float>(8.015776984e-7), constant<float>(3.326951409e-4)), q);
  return pdiv(pmadd(pmul(y, z), p, y), pmadd(z, q, one));
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
  const P result = pselect(pcmp_lt(size, constant<double>(0.625)), near, far_signed);
  return pselect(pcmp_eq(x, x), result, x);
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
