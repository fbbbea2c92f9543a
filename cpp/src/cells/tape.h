// What a cell keeps of a step for its way back: runs of n values one behind the other, of S or
// narrow.
//
// Narrow, c and u_n are rounded to bfloat16 as they are. Of a gate or a tanh, in [-1, 1], the way
// back takes both a and 1 - |a|, and near 1 the rounded a would have lost the latter: a forget gate
// of 0.998 would remember for ever, or half as long as it did. So beyond 1/2 it is 1 - |a| that is
// kept, scaled to where no a is, and both have the relative precision of bfloat16.
#pragma once
#include "kernels/bfloat16.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

constexpr double narrow_scale = 1 << 30;
// Stands for the 1 - |a| of zero, whose scaled value would look like an a: 1 less this is 1.
constexpr double narrow_least = narrow_scale / (1 << 26);

FASTBPTT_INLINE Packet<float> with_sign_of(const Packet<float>& sign, const Packet<float>& value) {
  return Eigen::internal::por(value, Eigen::internal::pand(sign, constant<float>(-0.0)));
}

FASTBPTT_INLINE Packet<float> by_nearer_end(const Packet<float>& a) {
  const Packet<float> size = Eigen::internal::pabs(a), scale = constant<float>(narrow_scale);
  const Packet<float> rest =
      Eigen::internal::pmax(psub(scale, pmul(scale, size)), constant<float>(narrow_least));
  return pselect(pcmp_lt(constant<float>(0.5), size), with_sign_of(a, rest), a);
}

FASTBPTT_INLINE Packet<float> from_nearer_end(const Packet<float>& kept) {
  const Packet<float> size = Eigen::internal::pabs(kept);
  const Packet<float> near_one =
      psub(constant<float>(1), pmul(constant<float>(1 / narrow_scale), size));
  return pselect(pcmp_lt(constant<float>(0.75), size), with_sign_of(kept, near_one), kept);
}

// A run to read. The values of a state that stand beside those of a narrow tape are rounded as that
// is: so where a tape begins does not change a bit.
template <class S>
struct TapeRun {
  const S* wide = nullptr;
  const Bfloat16* narrow = nullptr;
  bool rounds = false;

  FASTBPTT_INLINE Packet<S> value(Index n) const {
    if constexpr (std::is_same_v<S, float>) {
      if (narrow) return load(narrow, n);
      if (rounds) return rounded_to_bfloat16(load(wide, n));
    }
    return load(wide, n);
  }
};

// All runs of a packet of hidden units, to write or, with const S, to read. Null: keep nothing.
template <class S>
struct TapeUnit {
  S* wide = nullptr;
  Narrow<S>* narrow = nullptr;
  explicit operator bool() const { return wide || narrow; }

  FASTBPTT_INLINE TapeRun<std::remove_const_t<S>> run(Index which, Index n) const {
    return {wide ? wide + which * n : nullptr, narrow ? narrow + which * n : nullptr};
  }
  FASTBPTT_INLINE auto value(Index which, Index n) const { return run(which, n).value(n); }
  FASTBPTT_INLINE auto activation(Index which, Index n) const {
    const auto kept = value(which, n);
    if constexpr (std::is_same_v<S, const float>) {
      if (narrow) return from_nearer_end(kept);
    }
    return kept;
  }

  FASTBPTT_INLINE void keep(Index which, const Packet<S>& value, Index n) const {
    if constexpr (std::is_same_v<S, float>) {
      if (narrow) return store(narrow + which * n, value, n);
    }
    store(wide + which * n, value, n);
  }
  FASTBPTT_INLINE void keep_activation(Index which, const Packet<S>& value, Index n) const {
    if constexpr (std::is_same_v<S, float>) {
      if (narrow) return store(narrow + which * n, by_nearer_end(value), n);
    }
    store(wide + which * n, value, n);
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
