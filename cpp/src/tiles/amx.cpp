// Products of parts by the tile registers of AMX.
//
// Four tiles of sums, 32 rows and two packets or 16 rows and four, are what hides the latency of a
// multiplication. All pairs of parts of 32 values of k are added before the next 32, so that each
// tile of an operand is loaded about once for them.
#include <type_traits>

#include "kernels/part_products.h"
#include "tiles/tiles.h"

namespace fastbptt {
namespace amx {

extern const PartProducts part_products;

namespace {

static_assert(part_rows == tile_rows && part_depth == tile_depth,
              "tiles of operands are read whole");

// Not those of the standard library, whose copies of another instruction set the linker might keep.
inline Index least(Index a, Index b) { return a < b ? a : b; }

// Which part of a meets which part of b, so that one of them is the same as before.
template <int parts>
struct Pairs;
template <>
struct Pairs<1> {
  static constexpr int a[] = {0}, b[] = {0};
};
template <>
struct Pairs<2> {
  static constexpr int a[] = {1, 0, 0}, b[] = {0, 0, 1};
};
template <>
struct Pairs<3> {
  static constexpr int a[] = {2, 1, 1, 0, 0, 0}, b[] = {0, 0, 1, 1, 0, 2};
};

template <int begin, int end, class F>
inline void each(F&& f) {
  if constexpr (begin < end) {
    f(std::integral_constant<int, begin>{});
    each<begin + 1, end>(f);
  }
}

// R tiles of rows by N packets. Sums are in tiles 0 to 3, a in 4 and 5, the panel in those behind.
template <int parts, int R, int N>
class Block {
  static_assert(R * N <= 4);
  static constexpr int first_a = 4, first_b = 4 + R, tiles_b = 8 - first_b;

 public:
  Block(const PartsProduct& product, Index row, int packet)
      : p_(product),
        a_(product.a + row / tile_rows * product.a_rows),
        panel_(product.panel + packet * product.panel_packet),
        sums_(product.sums + row * product.sums_row + packet * 16),
        start_(product.start ? product.start + packet * 16 : nullptr),
        rows_(least(product.rows - row, R * tile_rows)) {}

  void run() const {
    start_ ? begin_with_start() : transfer<true>();
    for (Index run = 0; run < p_.runs; ++run) {
      const Bfloat16* a = a_ + run * p_.a_run;
      const Bfloat16* panel = panel_ + run * p_.panel_run;
      for (Index k = 0; k < p_.K; k += tile_depth) {
        multiply_parts(a, panel);
        a += parts * part_tile;
        panel += parts * part_tile;
      }
    }
    transfer<false>();
  }

 private:
  void multiply_parts(const Bfloat16* a, const Bfloat16* panel) const {
    using Of = Pairs<parts>;
    each<0, sizeof(Of::a) / sizeof(int)>([&](auto i) {
      constexpr bool first = i == 0;
      constexpr int part_a = Of::a[i], part_b = Of::b[i], before = first ? 0 : i - 1;
      constexpr bool new_a = first || part_a != Of::a[before];
      constexpr bool new_b = first || part_b != Of::b[before] || N > tiles_b;
      if constexpr (new_a) {
        each<0, R>([&](auto r) {
          load<first_a + r>(a + part_a * part_tile + r * p_.a_rows, tile_row_bytes);
        });
      }
      each<0, N>([&](auto n) {
        constexpr int to = first_b + n % tiles_b;
        if constexpr (new_b) {
          load<to>(panel + part_b * part_tile + n * p_.panel_packet, tile_row_bytes);
        }
        each<0, R>([&](auto r) { multiply<r * N + n, first_a + r, to>(); });
      });
    });
  }

  // All rows alike.
  void begin_with_start() const {
    each<0, R>([&](auto r) { each<0, N>([&](auto n) { load<r * N + n>(start_ + n * 16, 0); }); });
  }

  // The sums to or from the tiles; by way of a copy where there are no 16 rows of them.
  template <bool in>
  void transfer() const {
    each<0, R>([&](auto r) {
      const Index rows = least(rows_ - r * tile_rows, tile_rows);
      each<0, N>([&](auto n) {
        constexpr int tile = r * N + n;
        float* const sums = sums_ + r * tile_rows * p_.sums_row + n * 16;
        if (rows == tile_rows) {
          const Index row_bytes = p_.sums_row * Index(sizeof(float));
          in ? load<tile>(sums, row_bytes) : store<tile>(sums, row_bytes);
          return;
        }
        alignas(64) float copy[tile_rows][16] = {};
        const auto copy_rows = [&](auto&& from, auto&& to) {
          for (Index i = 0; i < rows; ++i) std::memcpy(to(i), from(i), sizeof(copy[0]));
        };
        const auto of_sums = [&](Index i) { return sums + i * p_.sums_row; };
        const auto of_copy = [&](Index i) { return copy[i]; };
        if constexpr (in) {
          copy_rows(of_sums, of_copy);
          load<tile>(copy, sizeof(copy[0]));
        } else {
          store<tile>(copy, sizeof(copy[0]));
          copy_rows(of_copy, of_sums);
        }
      });
    });
  }

  const PartsProduct& p_;
  const Bfloat16* const a_;
  const Bfloat16* const panel_;
  float* const sums_;
  const float* const start_;
  const Index rows_;
};

template <int parts, int R, int N>
__attribute__((noinline)) void multiply_block(const PartsProduct& product, Index row, int packet) {
  Block<parts, R, N>(product, row, packet).run();
}

template <int parts>
void multiply_parts(const PartsProduct& product) {
  Index row = 0;
  for (; product.rows - row > tile_rows; row += 2 * tile_rows) {
    int packet = 0;
    for (; packet + 2 <= product.packets; packet += 2) {
      multiply_block<parts, 2, 2>(product, row, packet);
    }
    if (packet < product.packets) multiply_block<parts, 2, 1>(product, row, packet);
  }
  if (row >= product.rows) return;
  switch (product.packets) {
    case 1:
      return multiply_block<parts, 1, 1>(product, row, 0);
    case 2:
      return multiply_block<parts, 1, 2>(product, row, 0);
    case 3:
      return multiply_block<parts, 1, 3>(product, row, 0);
    default:
      return multiply_block<parts, 1, 4>(product, row, 0);
  }
}

void multiply(const PartsProduct& product) {
  switch (product.parts) {
    case 1:
      return multiply_parts<1>(product);
    case 2:
      return multiply_parts<2>(product);
    default:
      return multiply_parts<3>(product);
  }
}

Index padded(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }

// How much faster than with float32 vectors a training step with whole tiles is, at 128 units and
// more, a little less than was measured; with three parts of each value fewer gain nothing.
double gain(int parts) { return parts == 1 ? 3 : parts == 2 ? 1.7 : 1.25; }
Index least_units(int parts) { return parts == 3 ? 128 : 32; }

int parts_of(const LayerShape& s, MatmulPrecision precision, Index B, Index rows) {
  const int parts = precision == MatmulPrecision::medium ? 1
                    : precision == MatmulPrecision::high ? 2
                                                         : 3;
#ifdef FASTBPTT_EMULATE_AMX
  // What is tested is every size.
  return s.hidden_size > 0 && B > 0 && rows > 0 ? parts : 0;
#endif
  // Rows of the batch are what fills a tile of the sums; of the weight gradients, its depth.
  const auto filled = [](Index n, Index multiple) { return double(padded(n, multiple)) / n; };
  const double wasted = (2 * filled(B, tile_rows) + filled(B, tile_depth)) / 3 *
                        filled(s.input_size + s.output_size(), tile_depth);
  return rows >= 64 && s.hidden_size >= least_units(parts) && wasted < gain(parts) ? parts : 0;
}

}  // namespace

const PartProducts part_products = {most_parts, tile_depth, parts_of, configure, release, multiply};

}  // namespace amx
}  // namespace fastbptt
