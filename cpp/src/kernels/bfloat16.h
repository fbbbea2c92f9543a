// Packets of float32 to bfloat16 and back, in the compiler's own vectors, which every instruction
// set has.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/packet.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

constexpr Index float_lanes = lanes<float>;
typedef float FloatVector __attribute__((vector_size(float_lanes * 4)));
typedef std::uint32_t BitsVector __attribute__((vector_size(float_lanes * 4)));
typedef std::uint16_t Bfloat16Vector __attribute__((vector_size(float_lanes * 2)));

// The bits of the nearest bfloat16, of two as near the even one, in the lower half of each lane.
// NaN stays NaN: to round it as the others could carry it into infinity or zero.
FASTBPTT_INLINE BitsVector nearest_bfloat16(const Packet<float>& value) {
  FloatVector x;
  BitsVector bits;
  std::memcpy(&x, &value, sizeof x);
  std::memcpy(&bits, &value, sizeof bits);
  // With half of what the lower half can hold added, a little less where the upper half is even,
  // the upper half of a finite number is the nearest.
  const BitsVector rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  return x == x ? rounded : ((bits >> 16) | 0x40u);
}

FASTBPTT_INLINE Packet<float> widened(const BitsVector& bits) {
  const BitsVector all = bits << 16;
  Packet<float> value;
  std::memcpy(&value, &all, sizeof value);
  return value;
}

FASTBPTT_INLINE Packet<float> rounded_to_bfloat16(const Packet<float>& value) {
  return widened(nearest_bfloat16(value));
}

FASTBPTT_INLINE void store(Bfloat16* to, const Packet<float>& value) {
  const Bfloat16Vector bits = __builtin_convertvector(nearest_bfloat16(value), Bfloat16Vector);
  std::memcpy(to, &bits, sizeof bits);
}

FASTBPTT_INLINE Packet<float> load(const Bfloat16* from) {
#ifdef EIGEN_VECTORIZE_AVX512
  // The compiler would widen its vector by halves.
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
#else
  Bfloat16Vector bits;
  std::memcpy(&bits, from, sizeof bits);
  return widened(__builtin_convertvector(bits, BitsVector));
#endif
}

// The first n <= lanes values, as of float.
FASTBPTT_INLINE void store(Bfloat16* to, const Packet<float>& value, Index n) {
  if (n == float_lanes) return store(to, value);
  Bfloat16 values[float_lanes];
  store(values, value);
  for (Index i = 0; i < n; ++i) to[i] = values[i];
}

FASTBPTT_INLINE Packet<float> load(const Bfloat16* from, Index n) {
  if (n == float_lanes) return load(from);
  Bfloat16 values[float_lanes] = {};
  for (Index i = 0; i < n; ++i) values[i] = from[i];
  return load(values);
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
