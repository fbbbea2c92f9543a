// Packed weights as parts, made from packed float32 panels, whose rows may come in another order.
//
//   Span of the weights of each output; then for each panel and packet its tiles
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
  Index size() const { return header + floats_of(panels_ * packets_ * packet()); }

  // row(j, k): the Q(j) packets of row k of panel j, or null for zeros.
  template <class Packets, class Row>
  void pack(float* to, Packets&& packets, Row&& row) const {
    Span span;
    for (Index j = 0; j < panels_; ++j) {
      for (Index q = 0; q < packets(j); ++q) {
        Largest largest;
        split_pairs(room(K_), parts_, parts_of(to) + (j * packets_ + q) * packet(), [&](Index k) {
          const float* const from = k < K_ ? row(j, k) : nullptr;
          if (!from) return from;
          largest.add(_mm512_loadu_ps(from + q * 16));
          return from + q * 16;
        });
        alignas(64) std::uint32_t lanes[16];
        _mm512_store_si512(lanes, largest.lanes);
        for (const std::uint32_t most : lanes) span.add(most);
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
  static Index room(Index K) { return padded(K, part_depth); }

  Index depth() const { return K_; }

  // sums = start, or sums if that is null, plus a times panel j, of Q packets; of the values
  // [begin, end) of a row, where a tile begins.
  void multiply(const PartProducts& products, Index rows, const Bfloat16* a, Index a_rows,
                const float* packed, Index j, Index Q, float* sums, Index sums_row,
                const float* start, const RowsAhead& ahead, Index begin, Index end) const {
    const Index at = begin * part_rows * parts_;
    products.multiply({parts_, rows, static_cast<int>(Q), padded(end - begin, products.depth), 1,
                       a + at, 0, a_rows, part_depth,
                       parts_of(packed) + j * packets_ * packet() + at, 0, packet(), sums, sums_row,
                       start});
  }

 private:
  static constexpr Index header = 16;  // of floats: the Span, in a cache line of its own
  static Bfloat16* parts_of(float* data) { return reinterpret_cast<Bfloat16*>(data + header); }
  static const Bfloat16* parts_of(const float* data) {
    return reinterpret_cast<const Bfloat16*>(data + header);
  }
  // Values of the parts of a packet.
  Index packet() const { return room(K_) * 16 * parts_; }

  Index K_;
  Index packets_;
  Index panels_;
  int parts_;
};

#endif

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
