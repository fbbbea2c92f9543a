// Products of bfloat16 parts, on their own, compared with float64 and with a plain float32 loop.
//
//   part_products [SEED [COUNT]]
//
// The instruction set is that of FASTBPTT_ISA; one without such products ends with 77.
#include "kernels/part_products.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "dispatch/dispatch.h"
#include "drawing.h"

namespace fastbptt::tests {
namespace {

Bfloat16 rounded(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

struct Errors {
  double parts = 0;
  double plain = 0;
};

// The largest errors over all sums, relative to the sum of the magnitudes.
Errors errors_of_one(Random& random, const PartProducts& products, int parts, bool& wrong) {
  const Index rows = random.between(1, 70), runs = random.between(1, 3);
  const int packets = static_cast<int>(random.between(1, 4));
  const Index K = (random.between(1, 150) + products.depth - 1) / products.depth * products.depth;
  const Index n = packets * 16, tiles = (K + part_depth - 1) / part_depth;
  const Index a_row = std::min(K, part_depth), row_tiles = (rows + part_rows - 1) / part_rows;
  const Index a_rows = tiles * parts * part_rows * a_row + 32 * random.between(0, 2),
              a_run = row_tiles * a_rows;
  const Index panel_packet = tiles * parts * part_tile + 32 * random.between(0, 2),
              panel_run = packets * panel_packet, sums_row = n + random.between(0, 20);
  const bool starts = random.between(0, 1) == 1;
  const double scale_a = std::pow(10.0, random.between(-12, 12)),
               scale_b = std::pow(10.0, random.between(-12, 12));
  std::vector<float> a(runs * rows * K), b(runs * K * n), sums(rows * sums_row), bias(n), start;
  for (float& v : a) v = float(scale_a * random.normal());
  for (float& v : b) v = float(scale_b * random.normal());
  for (float& v : sums) v = float(scale_a * scale_b * random.normal());
  for (float& v : bias) v = float(scale_a * scale_b * random.normal());
  start = sums;
  std::vector<Bfloat16> a_parts(runs * a_run), panel(runs * panel_run);
  for (Index run = 0; run < runs; ++run) {
    for (Index k = 0; k < K; ++k) {
      for (Index r = 0; r < rows; ++r) {
        float left = a[(run * rows + r) * K + k];
        for (int i = 0; i < parts; ++i) {
          const Bfloat16 part = rounded(left);
          a_parts[run * a_run + r / part_rows * a_rows +
                  (k / part_depth * parts + i) * part_rows * a_row + r % part_rows * a_row +
                  k % part_depth] = part;
          left -= widened(part);
        }
      }
      for (Index j = 0; j < n; ++j) {
        float left = b[(run * K + k) * n + j];
        for (int i = 0; i < parts; ++i) {
          const Bfloat16 part = rounded(left);
          panel[run * panel_run + j / 16 * panel_packet + (k / part_depth * parts + i) * part_tile +
                k % part_depth / 2 * 32 + j % 16 * 2 + k % 2] = part;
          left -= widened(part);
        }
      }
    }
  }
  products.begin();
  products.multiply({parts, rows, packets, K, runs, a_parts.data(), a_run, a_rows, a_row,
                     panel.data(), panel_run, panel_packet, sums.data(), sums_row,
                     starts ? bias.data() : nullptr});
  products.end();
  Errors errors;
  for (Index r = 0; r < rows; ++r) {
    for (Index j = 0; j < sums_row; ++j) {
      const float first = start[r * sums_row + j];
      const double actual = sums[r * sums_row + j];
      if (j >= n) {
        wrong |= actual != first;
        continue;
      }
      float plain = starts ? bias[j] : first;
      double exact = plain, size = std::abs(exact);
      for (Index run = 0; run < runs; ++run) {
        for (Index k = 0; k < K; ++k) {
          const float x = a[(run * rows + r) * K + k], w = b[(run * K + k) * n + j];
          exact += double(x) * w;
          size += std::abs(double(x) * w);
          plain = std::fma(x, w, plain);
        }
      }
      errors.parts = std::max(errors.parts, std::abs(actual - exact) / size);
      errors.plain = std::max(errors.plain, std::abs(plain - exact) / size);
      wrong |= !std::isfinite(actual);
    }
  }
  return errors;
}

int run(unsigned long seed, unsigned long count) {
  const std::string isa = isa_or_exit();
  const PartProducts* const products = part_products();
  if (!products) return 77;
  bool wrong = false;
  for (int parts = 1; parts <= products->most_parts; ++parts) {
    Errors worst;
    for (unsigned long i = 0; i < count; ++i) {
      Random random(seed + i);
      const Errors errors = errors_of_one(random, *products, parts, wrong);
      worst.parts = std::max(worst.parts, errors.parts);
      worst.plain = std::max(worst.plain, errors.plain);
    }
    // Half a unit of each factor; what the dropped products would have been; the float32 loop.
    const double allowed = parts == 1   ? std::ldexp(1.0, -7)
                           : parts == 2 ? std::ldexp(1.0, -15)
                                        : worst.plain;
    wrong |= !(worst.parts <= allowed);
    std::printf("%s: %d parts, %lu products, largest relative error %.2g, of float32 %.2g\n",
                isa.c_str(), parts, count, worst.parts, worst.plain);
  }
  return wrong ? 1 : 0;
}

}  // namespace
}  // namespace fastbptt::tests

int main(int argc, char** argv) {
  using fastbptt::tests::argument;
  return fastbptt::tests::run(argument(argc, argv, 1, 1), argument(argc, argv, 2, 200));
}
