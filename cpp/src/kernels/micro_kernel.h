// The register tile that all products are made of.
//
//   sums[r][q] += sum over k of a(r, k) * panel[k][q]     r < R rows, q < Q <= 4 packets
//
// a is read a value at a time and broadcast; a panel is packed so that the packets of one k stand
// side by side. A tile of tile_rows(Q) rows fills the registers with accumulators; one of more
// rows, a tall one, is made in two halves of two packets each.
//
// Each size of tile is one function, not inlined: the cells differ only in what they do before and
// after, and a call is nothing beside the loop.
#pragma once
#include <type_traits>

#include "kernels/fetches.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S, int R, int Q>
struct Tile {
  Packet<S> acc[R][Q];

  FASTBPTT_INLINE void zero() {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) acc[r][q] = constant<S>(0);
  }
  FASTBPTT_INLINE void read(const S* from, Index row) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) acc[r][q] = load(from + r * row + q * lanes<S>);
  }
  FASTBPTT_INLINE void write(S* to, Index row) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) store(to + r * row + q * lanes<S>, acc[r][q]);
  }
  FASTBPTT_INLINE void add(const Tile& other) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) acc[r][q] = padd(acc[r][q], other.acc[r][q]);
  }

  // From the sums of packets [0, Q) to those of [1, Q + 1): packet 0 is written, the last one read.
  FASTBPTT_INLINE void shift(S* to, Index to_row, const S* from, Index from_row) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      store(to + r * to_row, acc[r][0]);
#pragma GCC unroll 4
      for (int q = 0; q < Q - 1; ++q) acc[r][q] = acc[r][q + 1];
      acc[r][Q - 1] = load(from + r * from_row + Q * lanes<S>);
    }
  }

  // One k: a(r) points at the value of row r. What there is less of is held in registers.
  template <class A>
  FASTBPTT_INLINE void multiply(A&& a, const S* panel) {
    if constexpr (R <= Q) {
      Packet<S> rows[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) rows[r] = pset1<Packet<S>>(*a(r));
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const Packet<S> packet = load(panel + q * lanes<S>);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][q] = pmadd(rows[r], packet, acc[r][q]);
      }
    } else {
      Packet<S> packets[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) packets[q] = load(panel + q * lanes<S>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Packet<S> row = pset1<Packet<S>>(*a(r));
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) acc[r][q] = pmadd(row, packets[q], acc[r][q]);
      }
    }
  }
};

// A sum over `blocks` runs of K values, a(r, k) = a[r][block * a_block + k], and then over K_behind
// values of `behind` with a panel of their own; one of the two may be missing. The rows of a panel
// follow one another, Q packets each.
template <class S>
struct RowsProduct {
  S* sums;
  Index sums_row;
  const S* start;  // what is added to
  Index start_row;
  const S* a[most_tile_rows];
  Index a_block;
  Index blocks;
  Index K;
  const S* panel;
  const S* behind[most_tile_rows];
  Index K_behind = 0;
  const S* panel_behind = nullptr;
  const S* fetch = nullptr;          // what the next tiles want: a cache line for each k
  const RowFetches* soon = nullptr;  // a row before each block but the first

  // The caller fills in the rows of `a`, and of `behind`. To clear them first GCC takes a string
  // instruction, which before each tile is up to a twentieth of a step.
  RowsProduct(S* sums, Index sums_row, Index K, const S* panel, Index blocks = 1, Index a_block = 0)
      : sums(sums),
        sums_row(sums_row),
        start(sums),
        start_row(sums_row),
        a_block(a_block),
        blocks(blocks),
        K(K),
        panel(panel) {}

  // As much again of what is read next, by default what lies behind, shared out to the first tiles
  // of R rows that go by. The others are told without a division.
  void fetch_next(Index Q, Index R, Index row, const S* next = nullptr) {
    constexpr Index line = 64 / Index(sizeof(S));
    const Index k = blocks * K + K_behind, size = k * Q * lanes<S>, each = k * line;
    if (row * each < size * R) fetch = (next ? next : panel + size) + row / R * each;
  }
};

// With Sets > 1 the sum over k is split over that many accumulators, so that few rows do not wait
// for the latency of the additions. The panel's rows have `Width` packets, of which Q are taken,
// from `first` on. What comes behind is added to the sums `Shift` packets further.
template <class S, int R, int Q, int Sets, int Width = Q, int Shift = 0>
__attribute__((noinline)) void multiply_rows(const RowsProduct<S>& product, Index first = 0) {
  static_assert(Shift == 0 || (Shift == 1 && Sets == 1), "a tile shifts by one packet, as a whole");
  constexpr Index step = Width * lanes<S>;
  const Index skip = Width > Q ? first * lanes<S> : 0;
  const S* a[R];
  // One by one: a wider load would wait until all stores before it have left the core, as no store
  // of the caller's holds all of it.
  const auto take = [&a](const S* const volatile* rows) {
    for (int r = 0; r < R; ++r) a[r] = rows[r];
  };
  const S* panel = product.panel + skip;
  Index K = product.K, left = product.blocks;
  Tile<S, R, Q> tile;
  // What comes behind takes the same loop: in one of its own the compiler spills what both need.
  const auto go_behind = [&] {
    take(product.behind);
    panel = product.panel_behind + skip;
    K = product.K_behind;
    if constexpr (Shift == 1) {
      tile.shift(product.sums, product.sums_row, product.start, product.start_row);
    }
  };
  const auto goes_on = [&] {
    if (--left > 0) {
      for (int r = 0; r < R; ++r) a[r] += product.a_block;
      if constexpr (R > 1) {
        const Index row = product.blocks - left;
        if (product.soon && row < R && skip == 0) product.soon->fetch(row);
      }
      return true;
    }
    if (left < 0 || product.K_behind == 0) return false;
    go_behind();
    return true;
  };
  tile.read(product.start + skip, product.start_row);
  left == 0 ? go_behind() : take(product.a);
  if constexpr (Sets == 1) {
    // What is wanted next is fetched with the first packets.
    const bool fetches = product.fetch && skip == 0;
    const S* fetch = fetches ? product.fetch : panel;
    const Index fetch_step = fetches ? 64 / Index(sizeof(S)) : 0;
    do {
      for (Index k = 0; k < K; ++k, panel += step) {
        __builtin_prefetch(fetch);
        fetch += fetch_step;
        tile.multiply([&](int r) { return a[r] + k; }, panel);
      }
    } while (goes_on());
  } else {
    Tile<S, R, Q> more[Sets - 1];
#pragma GCC unroll 4
    for (int s = 0; s < Sets - 1; ++s) more[s].zero();
    do {
      Index k = 0;
      for (; k + Sets <= K; k += Sets, panel += Sets * step) {
        tile.multiply([&](int r) { return a[r] + k; }, panel);
#pragma GCC unroll 4
        for (int s = 1; s < Sets; ++s) {
          more[s - 1].multiply([&](int r) { return a[r] + k + s; }, panel + s * step);
        }
      }
      for (; k < K; ++k, panel += step) tile.multiply([&](int r) { return a[r] + k; }, panel);
    } while (goes_on());
#pragma GCC unroll 4
    for (int s = 0; s < Sets - 1; ++s) tile.add(more[s]);
  }
  tile.write(product.sums + Shift * lanes<S> + skip, product.sums_row);
}

// A sum over `runs` runs of K rows: a(r, k) = a[run * a_run + k * a_row + r], with the panel's row
// at run * panel_run + k * panel_row. The sums are contiguous.
template <class S>
struct ColumnsProduct {
  S* sums;
  const S* a;
  Index a_row;
  Index a_run;
  Index runs;
  Index K;
  const S* panel;
  Index panel_row;
  Index panel_run;
};

template <class S, int R, int Q, int Width = Q>
__attribute__((noinline)) void multiply_columns(const ColumnsProduct<S>& product, Index first = 0) {
  const Index skip = Width > Q ? first * lanes<S> : 0;
  S* const sums = product.sums + skip;
  Tile<S, R, Q> tile;
  // The sums of the tile behind this one come meanwhile.
  const S* fetch = sums + R * Width * lanes<S>;
  tile.read(sums, Width * lanes<S>);
  for (Index run = 0; run < product.runs; ++run) {
    const S* a = product.a + run * product.a_run;
    const S* panel = product.panel + skip + run * product.panel_run;
    for (Index k = 0; k < product.K; ++k, a += product.a_row, panel += product.panel_row) {
      __builtin_prefetch(fetch);
      fetch += 64 / sizeof(S);
      tile.multiply([&](int r) { return a + r; }, panel);
    }
  }
  tile.write(sums, Width * lanes<S>);
}

// Calls body with the integral constant n <= Most.
template <int Most, class F>
FASTBPTT_INLINE void with_constant(Index n, F&& body) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, body);
  }
  body(std::integral_constant<int, Most>{});
}

// A tall tile: body(R, first) for its left packets, and for the right ones. A copy of the product
// for these would be made of values just written: see `take`.
template <class F>
FASTBPTT_INLINE bool in_halves(Index R, Index Q, F&& body) {
  if constexpr (tall_tile_rows > 0) {
    if (Q != 4 || R <= tile_rows(4)) return false;
    with_constant<tall_tile_rows>(R, [&](auto r) {
      if constexpr (r > tile_rows(4)) body(r, 0), body(r, 2);
    });
    return true;
  }
  return false;
}

// `split` allows several accumulators a sum, whose order then depends on the number of rows; only
// where that is the same however the steps are cut.
template <class S>
__attribute__((noinline)) void multiply_rows(Index R, Index Q, bool split,
                                             const RowsProduct<S>& product) {
  const auto half = [&](auto r, Index first) { multiply_rows<S, r, 2, 1, 4>(product, first); };
  if (in_halves(R, Q, half)) return;
  with_constant<4>(Q, [&](auto q) {
    with_constant<tile_rows(q)>(R, [&](auto r) {
      constexpr int accumulators = r * q;
      constexpr int sets = accumulators >= 8 ? 1 : accumulators >= 4 ? 2 : 4;
      if (split && sets > 1)
        multiply_rows<S, r, q, sets>(product);
      else
        multiply_rows<S, r, q, 1>(product);
    });
  });
}

// What comes behind is added to the sums one packet further.
template <class S>
__attribute__((noinline)) void multiply_rows_shifted(Index R, const RowsProduct<S>& product) {
  with_constant<tile_rows(3)>(R, [&](auto r) { multiply_rows<S, r, 3, 1, 3, 1>(product); });
}

template <class S>
__attribute__((noinline)) void multiply_columns(Index R, Index Q,
                                                const ColumnsProduct<S>& product) {
  const auto half = [&](auto r, Index first) { multiply_columns<S, r, 2, 4>(product, first); };
  if (in_halves(R, Q, half)) return;
  with_constant<4>(Q, [&](auto q) {
    with_constant<tile_rows(q)>(R, [&](auto r) { multiply_columns<S, r, q>(product); });
  });
}

// Calls body(R, row) for tiles of Q packets that cover [0, rows) as evenly as they can, so that a
// tile of one row, which wastes the most, appears only where there is one row. They are tall where
// those of three rows would leave two of two, and these are more than a twentieth of all.
template <class F>
FASTBPTT_INLINE void for_row_tiles(Index rows, Index Q, F&& body) {
  const bool tall = tall_tile_rows > 0 && Q == 4 && rows % 3 == 1 && rows > 3 && rows < 48;
  Index tiles = ceil_div(rows, tall ? tall_tile_rows : tile_rows(Q));
  for (Index row = 0; row < rows; --tiles) {
    const Index R = ceil_div(rows - row, tiles);
    body(R, row);
    row += R;
  }
}

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
