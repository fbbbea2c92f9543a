// float32 values split into the bfloat16 parts of part_products.h, in the tiles of its products:
// rows, or pairs of rows side by side.
//
// A sum of such products is as accurate as one of float32 where the products of small parts neither
// vanish nor overflow. That is decided by the largest magnitude of a row: where it is infinite,
// NaN, or its product with that of the weights far from one, the caller takes float32 vectors
// instead, for all rows of the step, so that the decision does not depend on where time is cut.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef EIGEN_VECTORIZE_AVX512
#include <immintrin.h>
#endif

#include "kernels/packet.h"
#include "kernels/part_products.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// The layout of the panels is that of the products.
template <class S>
constexpr bool has_parts = std::is_same_v<S, float> && lanes<S> == 16;

#ifdef EIGEN_VECTORIZE_AVX512

FASTBPTT_INLINE Index padded(Index n, Index multiple) { return ceil_div(n, multiple) * multiple; }

// Elements of float32 memory that hold so many parts, in whole cache lines.
FASTBPTT_INLINE Index floats_of(Index parts) { return ceil_div(parts, 32) * 16; }

// Of the largest magnitudes of some rows, the least that is not zero, and the largest. Magnitudes
// are bits, which are ordered as they are; infinity and NaN lie above all others.
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

// The largest magnitude of each of 16 lanes.
struct Largest {
  __m512i lanes = _mm512_setzero_si512();
  FASTBPTT_INLINE void add(const __m512& values) {
    const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(values));
    lanes = _mm512_max_epu32(lanes, bits);
  }
  FASTBPTT_INLINE std::uint32_t all() const { return _mm512_reduce_max_epu32(lanes); }
};

// 32 values in a row, or 16 of two rows, of which one part after the other is taken. A part is the
// nearest number, of two as near the one farther from zero. What is not finite makes parts that
// nobody uses.
struct Split {
  __m512 low, high;

  FASTBPTT_INLINE static __m512i rounded(const __m512& values) {
    return _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
  }
  FASTBPTT_INLINE static __m512i upper_half() {
    return _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  }
  FASTBPTT_INLINE static __m512 left(const __m512& values, const __m512i& part) {
    return _mm512_sub_ps(values, _mm512_castsi512_ps(_mm512_and_si512(part, upper_half())));
  }

  // The upper halves of all lanes of low, then of high.
  FASTBPTT_INLINE static __m512i in_a_row(const __m512i& low, const __m512i& high) {
    const __m512i odd = _mm512_set_epi32(0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029,
                                         0x270025, 0x230021, 0x1f001d, 0x1b0019, 0x170015, 0x130011,
                                         0x0f000d, 0x0b0009, 0x070005, 0x030001);
    return _mm512_permutex2var_epi16(low, odd, high);
  }
  // Those of low and high in turn.
  FASTBPTT_INLINE static __m512i in_pairs(const __m512i& low, const __m512i& high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);
  }

  // write(part, rounded low, rounded high)
  template <class Write>
  FASTBPTT_INLINE void take(int parts, Write&& write) {
    for (int part = 0;;) {
      const __m512i first = rounded(low), second = rounded(high);
      write(part, first, second);
      if (++part == parts) return;
      low = left(low, first);
      high = left(high, second);
    }
  }
};

// The first n of up to 16 values, and zeros.
FASTBPTT_INLINE __m512 load16(const float* from, Index n) {
  if (n >= 16) return _mm512_loadu_ps(from);
  if (n <= 0) return _mm512_setzero_ps();
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
}

// 32 values as a row of a tile.
FASTBPTT_INLINE void split_line(const __m512& low, const __m512& high, int parts, Bfloat16* to) {
  Split{low, high}.take(parts, [&](int part, const __m512i& first, const __m512i& second) {
    _mm512_storeu_si512(to + part * part_tile, Split::in_a_row(first, second));
  });
}

// 16 values of two rows as a pair of a panel's tile.
FASTBPTT_INLINE void split_pair(const __m512& even, const __m512& odd, int parts, Bfloat16* to) {
  Split{even, odd}.take(parts, [&](int part, const __m512i& first, const __m512i& second) {
    _mm512_storeu_si512(to + part * part_tile, Split::in_pairs(first, second));
  });
}

// A row of n values in tiles, with zeros behind them up to `room`. Returns its largest magnitude.
inline __attribute__((noinline)) std::uint32_t split_row(const float* from, Index n, Index room,
                                                         int parts, Bfloat16* to) {
  Largest largest;
  for (Index k = 0; k < room; k += part_depth, to += parts * part_tile) {
    const __m512 low = load16(from + k, n - k), high = load16(from + k + 16, n - k - 16);
    largest.add(low);
    largest.add(high);
    split_line(low, high, parts, to);
  }
  return largest.all();
}

// A packet of rows two by two, for k below `room`; values(k) are those of row k.
template <class Values>
FASTBPTT_INLINE void split_pairs(Index room, int parts, Bfloat16* to, Values&& values) {
  for (Index k = 0; k < room; k += 2) {
    const __m512 even = values(k), odd = values(k + 1);
    split_pair(even, odd, parts,
               to + k / part_depth * parts * part_tile + k % part_depth * part_rows);
  }
}

// The next part of 16 rows of 32 values as a tile of pairs of their columns.
FASTBPTT_INLINE void split_turned(Split (&lines)[16], Bfloat16* to) {
  Eigen::internal::PacketBlock<Packet<float>, 16> block;
  for (int i = 0; i < 16; ++i) {
    const __m512i low = Split::rounded(lines[i].low), high = Split::rounded(lines[i].high);
    block.packet[i] = _mm512_castsi512_ps(Split::in_a_row(low, high));
    lines[i].low = Split::left(lines[i].low, low);
    lines[i].high = Split::left(lines[i].high, high);
  }
  Eigen::internal::ptranspose(block);
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * 32, block.packet[i]);
}

// The transpose of `rows` rows of n values, as tiles whose rows are `width` values of k, for k
// below `room`, a multiple of it; zeros where there is no row. 16 of the n are `step` behind the 16
// before. Returns what the rows span.
template <class Row>
FASTBPTT_INLINE Span split_transposed(Index rows, Index room, Index width, Index n, int parts,
                                      Bfloat16* to, Index step, Row&& row) {
  using Block = Eigen::internal::PacketBlock<Packet<float>, 16>;
  const auto first = static_cast<__mmask32>(0xffffffffu >> (part_depth - width));
  Span span;
  for (Index k = 0; k < room; k += width, to += parts * part_rows * width) {
    Largest largest[part_depth];
    for (Index i = 0; i < n; i += 16) {
      __m512 values[part_depth];
      for (Index r = 0; r < part_depth; ++r) {
        values[r] = _mm512_setzero_ps();
        if (r < width && k + r < rows) {
          const float* const from = row(k + r) + i;
          values[r] = load16(from, n - i);
          // Rows lie too far from each other to be seen coming.
          if (i + 64 < n) __builtin_prefetch(from + 64);
        }
        largest[r].add(values[r]);
      }
      for (int part = 0; part < parts; ++part) {
        Block block;
        for (Index pair = 0; pair < 16; ++pair) {
          __m512 &even = values[2 * pair], &odd = values[2 * pair + 1];
          const __m512i low = Split::rounded(even), high = Split::rounded(odd);
          block.packet[pair] = _mm512_castsi512_ps(Split::in_pairs(low, high));
          even = Split::left(even, low);
          odd = Split::left(odd, high);
        }
        Eigen::internal::ptranspose(block);
        Bfloat16* const tile = to + i / 16 * step + part * part_rows * width;
        for (Index column = 0; column < 16; ++column) {
          _mm512_mask_storeu_epi16(tile + column * width, first,
                                   _mm512_castps_si512(block.packet[column]));
        }
      }
    }
    for (Index r = 0; r < width && k + r < rows; ++r) span.add(largest[r].all());
  }
  return span;
}

#endif  // EIGEN_VECTORIZE_AVX512

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
