// float32 values split into the bfloat16 parts of part_products.h, in the layouts of its products:
// rows of one part behind the other, or pairs of rows side by side.
//
// A sum of such products is as accurate as one of float32 where the products of small parts neither
// vanish nor overflow. That is decided by the largest magnitude of a row: where it is infinite,
// NaN, or its product with that of the weights far from one, the caller takes float32 vectors
// instead, for all rows of the step, so that the decision does not depend on where time is cut.
#pragma once
#include <cstring>
#include <type_traits>

#include "kernels/bfloat16.h"
#include "kernels/part_products.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// The layout of the panels is that of the products.
template <class S>
constexpr bool has_parts = std::is_same_v<S, float> && lanes<S> == 16;

#ifdef EIGEN_VECTORIZE_AVX512

constexpr Index most_part_depth = 32;  // a multiple of that of every table
constexpr Index part_rows = 16;        // rows of a that may be read together

FASTBPTT_INLINE Index padded(Index n, Index multiple) { return ceil_div(n, multiple) * multiple; }

// Elements of float32 memory that hold so many parts, in whole cache lines.
FASTBPTT_INLINE Index floats_of(Index parts) { return ceil_div(parts, 32) * 16; }

// Magnitudes as bits, which are ordered as they are; infinity and NaN lie above all others.
FASTBPTT_INLINE std::uint32_t magnitude(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & 0x7fffffffu;
}

// Of the largest magnitudes of some rows, the least that is not zero, and the largest.
struct Span {
  std::uint32_t least = 0x7fffffffu;
  std::uint32_t most = 0;

  FASTBPTT_INLINE void add(std::uint32_t row) {
    if (row > 0 && row < least) least = row;
    if (row > most) most = row;
  }
  FASTBPTT_INLINE void add(const Span& other) {
    if (other.least < least) least = other.least;
    if (other.most > most) most = other.most;
  }
};

// Whether the products of rows like these are to be made of parts: rounding up must not make an
// infinity, and what is 24 bits below the largest, of the rows or of a product, is no denormal. Nor
// may the sums be denormals, which the instructions take for zeros; of rows that are all zeros the
// others tell, as of ones.
FASTBPTT_INLINE bool fit(const Span& a, const Span& b) {
  constexpr int least = -90, most = 100;
  const auto exponent = [](std::uint32_t bits) { return int(bits >> 23) - 127; };
  if (a.most == 0 && b.most == 0) return false;
  if (exponent(a.most) >= 127 || exponent(b.most) >= 127) return false;
  const int least_a = a.most == 0 ? 0 : exponent(a.least);
  const int least_b = b.most == 0 ? 0 : exponent(b.least);
  const int most_a = a.most == 0 ? 0 : exponent(a.most);
  const int most_b = b.most == 0 ? 0 : exponent(b.most);
  return least_a >= least && least_b >= least && least_a + least_b >= least &&
         most_a + most_b <= most;
}

// The largest magnitude of 16 lanes.
struct Largest {
  alignas(64) std::uint32_t lane[16] = {};
  FASTBPTT_INLINE void add(const float* values) {
    for (int i = 0; i < 16; ++i) {
      const std::uint32_t bits = magnitude(values[i]);
      lane[i] = bits > lane[i] ? bits : lane[i];
    }
  }
  FASTBPTT_INLINE std::uint32_t all() const {
    std::uint32_t most = 0;
    for (int i = 0; i < 16; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
  }
};

// The next part of each of 16 values, to nearest even; the values become what it leaves. What is
// not finite makes parts that nobody uses.
FASTBPTT_INLINE void take_part(float* values, std::uint32_t* part) {
  for (int i = 0; i < 16; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    bits = rounded_in_upper_half(bits) & 0xffff0000u;
    float rounded;
    std::memcpy(&rounded, &bits, sizeof(bits));
    values[i] -= rounded;
    part[i] = bits;
  }
}

// 16 values, which are lost, as parts that are `step` apart.
FASTBPTT_INLINE void split(float* values, int parts, Bfloat16* to, Index step) {
  for (int part = 0; part < parts; ++part, to += step) {
    alignas(64) std::uint32_t bits[16];
    take_part(values, bits);
    for (int i = 0; i < 16; ++i) to[i].bits = static_cast<std::uint16_t>(bits[i] >> 16);
  }
}

// 16 values of two rows as parts side by side.
FASTBPTT_INLINE void split_pair(float* even, float* odd, int parts, Bfloat16* to, Index step) {
  for (int part = 0; part < parts; ++part, to += step) {
    alignas(64) std::uint32_t low[16], high[16];
    take_part(even, low);
    take_part(odd, high);
    for (int i = 0; i < 16; ++i) low[i] = low[i] >> 16 | high[i];
    std::memcpy(to, low, sizeof(low));
  }
}

// The first n of up to 16 values; zeros behind them, or all where there is no row.
FASTBPTT_INLINE void copy16(const float* from, Index n, float* to) {
  store(to, from ? load(from, n) : constant<float>(0));
}

// A row of n values as rows of parts, padded with zeros to `room`, a multiple of 16. Returns its
// largest magnitude.
inline __attribute__((noinline)) std::uint32_t split_row(const float* from, Index n, Index room,
                                                         int parts, Bfloat16* to, Index step) {
  Largest largest;
  alignas(64) float values[16];
  for (Index i = 0; i < room; i += 16) {
    copy16(i < n ? from + i : nullptr, i + 16 <= n ? 16 : n - i, values);
    largest.add(values);
    split(values, parts, to + i, step);
  }
  return largest.all();
}

// Rows two by two, n values each, a multiple of 16; row(k) is null where there is none. Pair k / 2
// lies at to + k / 2 * pair.
template <class Row>
FASTBPTT_INLINE void split_pairs(Index rows, Index n, int parts, Bfloat16* to, Index pair,
                                 Index step, Row&& row) {
  alignas(64) float even[16], odd[16];
  for (Index k = 0; k < rows; k += 2, to += pair) {
    const float* const first = row(k);
    const float* const second = k + 1 < rows ? row(k + 1) : nullptr;
    for (Index i = 0; i < n; i += 16) {
      copy16(first ? first + i : nullptr, 16, even);
      copy16(second ? second + i : nullptr, 16, odd);
      split_pair(even, odd, parts, to + 2 * i, step);
    }
  }
}

// The transpose of `rows` rows of n values: value (k, i) goes to to[i * column + k], for k below
// `room`, zeros where there is no row. Returns what the rows span.
template <class Row>
FASTBPTT_INLINE Span split_transposed(Index rows, Index room, Index n, int parts, Bfloat16* to,
                                      Index column, Index step, Row&& row) {
  using Block = Eigen::internal::PacketBlock<Packet<float>, 16>;
  Span span;
  for (Index k = 0; k < room; k += 16) {
    Largest largest[16];
    for (Index i = 0; i < n; i += 16) {
      const Index valid = n - i < 16 ? n - i : 16;
      Block block;
      alignas(64) float values[16];
      for (Index r = 0; r < 16; ++r) {
        const float* const from = k + r < rows ? row(k + r) : nullptr;
        copy16(from ? from + i : nullptr, valid, values);
        largest[r].add(values);
        block.packet[r] = load(values);
      }
      Eigen::internal::ptranspose(block);
      for (Index r = 0; r < valid; ++r) {
        store(values, block.packet[r]);
        Bfloat16* const at = to + (i + r) * column + k;
        if (k + 16 <= room) {
          split(values, parts, at, step);
          continue;
        }
        Bfloat16 whole[most_parts * 16];
        split(values, parts, whole, 16);
        for (int part = 0; part < parts; ++part) {
          std::memcpy(at + part * step, whole + part * 16, (room - k) * sizeof(Bfloat16));
        }
      }
    }
    for (Index r = 0; k + r < rows && r < 16; ++r) span.add(largest[r].all());
  }
  return span;
}

#endif  // EIGEN_VECTORIZE_AVX512

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
