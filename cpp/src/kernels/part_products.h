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

// sums[r][n] += the sum over runs and k < K of a(r, k) * panel(k, n), for r < rows and
// n < packets * 16.
//   a      value (r, k) of part i is a[i * a_part + run * a_run + r * a_row + k]
//   panel  k and k + 1 stand side by side: panel[i * panel_part + run * panel_run + k / 2 *
//          panel_row + n * 2 + k % 2]
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
  Index a_part;
  Index a_run;
  Index a_row;
  const Bfloat16* panel;
  Index panel_part;
  Index panel_run;
  Index panel_row;
  float* sums;
  Index sums_row;
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
