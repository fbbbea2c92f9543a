// Products of float32 matrices made of bfloat16 ones: each value is a sum of parts,
//
//   x = x1 + x2 + x3,   x1 = bf16(x), x2 = bf16(x - x1), x3 = bf16(x - x1 - x2)
//
// and a product that of those pairs of parts that matter, added in float32 (Henry, Tang & Heinecke
// 2019). Three parts are all of a float32.
//
// The instructions for it come in sets of their own, which are no part of any Eigen: each is a
// table like this one, compiled by itself, and the layer kernels walk through time as ever.
#pragma once
#include <cstdint>

#include "fastbptt/types.h"

namespace fastbptt {

constexpr int most_parts = 3;

// What is multiplied lies in tiles, one behind the other, each as the instructions read it:
//   of a       16 rows of 32 values of k
//   of panels  16 pairs of k, k and k + 1 side by side, of the 16 values of a packet
constexpr Index part_rows = 16;
constexpr Index part_depth = 32;
constexpr Index part_tile = part_rows * part_depth;

// sums[r][n] = start[n], or sums[r][n] where that is null, plus the sum over runs and k < K of
// a(r, k) * panel(k, n), for r < rows and n < packets * 16.
//   a      value (r, k) of part i is a[run * a_run + r / 16 * a_rows +
//          (k / 32 * parts + i) * 16 * a_row + r % 16 * a_row + k % 32]; a_row is 32, or K where
//          that is less
//   panel  and value (k, n) panel[run * panel_run + n / 16 * panel_packet +
//          (k / 32 * parts + i) * 512 + k % 32 / 2 * 32 + n % 16 * 2 + k % 2]
// K is a multiple of the table's depth, with zeros where there is nothing. Rows of a up to the next
// multiple of 16 may be read.
// The order of each sum depends on none of the sizes but K, and where the runs end is no part of
// it.
struct PartsProduct {
  int parts;
  Index rows;
  int packets;
  Index K;
  Index runs;
  const Bfloat16* a;
  Index a_run;
  Index a_rows;
  Index a_row;
  const Bfloat16* panel;
  Index panel_run;
  Index panel_packet;
  float* sums;
  Index sums_row;
  const float* start;
};

struct PartProducts {
  int most_parts;
  Index depth;
  // How many parts a layer's values are split into where B rows at a time go through it, and `rows`
  // of time x batch in all; 0: float32 vectors are faster.
  int (*parts)(const LayerShape&, MatmulPrecision, Index B, Index rows);
  // Around the products of a thread.
  void (*begin)();
  void (*end)();
  void (*multiply)(const PartsProduct&);
};

}  // namespace fastbptt
