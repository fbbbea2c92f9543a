// Products of one part by VDPBF16PS, which adds two products of bfloat16 at once: with the register
// tile of micro_kernel.h, twice the rate of float32. Products of several parts would not be faster
// than float32 is.
#include <immintrin.h>

#include <type_traits>

#include "kernels/part_products.h"

namespace fastbptt {
namespace avx512_bf16 {

extern const PartProducts part_products;

namespace {

constexpr Index panel_bytes = 24 * 1024;
constexpr Index tile_pairs = part_depth / 2;
constexpr int accumulators = 24;
constexpr int most_rows = 8;
constexpr int tile_rows(int packets) {
  return accumulators / packets < most_rows ? accumulators / packets : most_rows;
}

// A pair of values of a, in all lanes.
inline __m512bh broadcast(const Bfloat16* pair) {
  int both;
  __builtin_memcpy(&both, pair, sizeof(both));
  return (__m512bh)_mm512_set1_epi32(both);
}

// The tiles of k [begin, end), of every run.
template <int R, int Q>
__attribute__((noinline)) void multiply_tile(const PartsProduct& p, Index row, Index begin,
                                             Index end) {
  __m512 sums[R][Q];
  float* const to = p.sums + row * p.sums_row;
  const bool started = p.start && begin == 0;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
      sums[r][q] = _mm512_loadu_ps(started ? p.start + q * 16 : to + r * p.sums_row + q * 16);
  Index at[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    at[r] = (row + r) / part_rows * p.a_rows + (row + r) % part_rows * p.a_row;
  for (Index run = 0; run < p.runs; ++run) {
    for (Index k = begin; k < end; ++k) {
      const Bfloat16* a = p.a + run * p.a_run + k * part_rows * p.a_row;
      const Bfloat16* panel = p.panel + run * p.panel_run + k * part_tile;
      const Index left = p.K / 2 - k * tile_pairs, pairs = left < tile_pairs ? left : tile_pairs;
      for (Index pair = 0; pair < pairs; ++pair, a += 2, panel += 32) {
        __m512bh packets[Q];
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q)
          packets[q] = (__m512bh)_mm512_loadu_si512(panel + q * p.panel_packet);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512bh value = broadcast(a + at[r]);
#pragma GCC unroll 4
          for (int q = 0; q < Q; ++q) sums[r][q] = _mm512_dpbf16_ps(sums[r][q], value, packets[q]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) _mm512_storeu_ps(to + r * p.sums_row + q * 16, sums[r][q]);
}

template <int Most, class F>
void with_constant(Index n, F&& body) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, body);
  }
  body(std::integral_constant<int, Most>{});
}

template <int Q>
void multiply_rows(const PartsProduct& product, Index begin, Index end) {
  Index tiles = (product.rows + tile_rows(Q) - 1) / tile_rows(Q);
  for (Index row = 0; row < product.rows; --tiles) {
    const Index R = (product.rows - row + tiles - 1) / tiles;
    with_constant<tile_rows(Q)>(R, [&](auto r) { multiply_tile<r, Q>(product, row, begin, end); });
    row += R;
  }
}

void multiply(const PartsProduct& product) {
  const Index tiles = (product.K + part_depth - 1) / part_depth;
  const Index fit = panel_bytes / (product.packets * part_tile * Index(sizeof(Bfloat16)));
  const bool whole =
      product.runs > 1 || tiles <= fit + fit / 2 || product.rows <= tile_rows(product.packets);
  const Index passes = whole ? 1 : (tiles + fit - 1) / fit;
  for (Index i = 0; i < passes; ++i) {
    with_constant<4>(product.packets, [&](auto q) {
      multiply_rows<q>(product, tiles * i / passes, tiles * (i + 1) / passes);
    });
  }
}

int parts_of(const LayerShape& s, MatmulPrecision precision, Index B, Index rows) {
  return precision == MatmulPrecision::medium && B >= 4 && rows >= 64 && s.hidden_size >= 32 ? 1
                                                                                             : 0;
}

}  // namespace

const PartProducts part_products = {1, 2, parts_of, [] {}, [] {}, multiply};

}  // namespace avx512_bf16
}  // namespace fastbptt
