// Packed weights as parts, made from packed float32 panels, whose rows may come in another order.
//
//   Span of the weights of each output; then for each panel its parts, one behind the other, in
//   pairs of rows [K / 2][packets][16][2]
#pragma once
#include "kernels/parts.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

#ifdef EIGEN_VECTORIZE_AVX512

class PartPanels {
 public:
  // Panels of up to `packets` packets, for K values of a.
  PartPanels(Index K, Index packets, Index panels, int parts)
      : K_(K), packets_(packets), panels_(panels), parts_(parts) {}

  // Elements of float32 memory.
  Index size() const { return header + floats_of(panels_ * parts_ * part()); }

  // row(j, k): the Q(j) packets of row k of panel j.
  template <class Packets, class Row>
  void pack(float* to, Packets&& packets, Row&& row) const {
    Span span;
    for (Index j = 0; j < panels_; ++j) {
      const Index Q = packets(j);
      const auto row_of_panel = [&](Index k) { return k < K_ ? row(j, k) : nullptr; };
      split_pairs(room(K_), Q * 16, parts_, parts_of(to) + j * parts_ * part(), pair(), part(),
                  row_of_panel);
      for (Index q = 0; q < Q; ++q) {
        Largest largest;
        for (Index k = 0; k < K_; ++k) largest.add(row(j, k) + q * 16);
        for (const std::uint32_t most : largest.lane) span.add(most);
      }
    }
    std::memcpy(to, &span, sizeof(span));
  }
  static Span span(const float* packed) {
    Span span;
    std::memcpy(static_cast<void*>(&span), packed, sizeof(span));
    return span;
  }

  // Values of a row of a.
  static Index room(Index K) { return padded(K, most_part_depth); }

  // sums += a times panel j, of Q packets.
  void multiply(const PartProducts& products, Index rows, const Bfloat16* a, Index a_row,
                Index a_part, const float* packed, Index j, Index Q, float* sums,
                Index sums_row) const {
    products.multiply({parts_, rows, static_cast<int>(Q), padded(K_, products.depth), 1, a, a_part,
                       0, a_row, parts_of(packed) + j * parts_ * part(), part(), 0, pair(), sums,
                       sums_row});
  }

 private:
  static constexpr Index header = 16;  // of floats: the Span, in a cache line of its own
  static Bfloat16* parts_of(float* data) { return reinterpret_cast<Bfloat16*>(data + header); }
  static const Bfloat16* parts_of(const float* data) {
    return reinterpret_cast<const Bfloat16*>(data + header);
  }
  Index pair() const { return packets_ * 32; }
  Index part() const { return room(K_) / 2 * pair(); }

  Index K_;
  Index packets_;
  Index panels_;
  int parts_;
};

#endif

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
