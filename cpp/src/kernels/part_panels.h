// Packed weights as parts. Steps that parts are not for take float32 panels, which few runs ever
// need: the first thread that does packs them.
//
//   Span of the weights of each output, and whether there are float32 panels; then for each panel
//   and packet its tiles
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

  // The 16 outputs of a packet as columns: row(j, q, k) has their weights for value k, the first n
  // of them, or null for zeros.
  struct Row {
    const float* from;
    Index n;
  };
  template <class Packets, class RowOf>
  void pack_columns(float* to, Packets&& packets, RowOf&& row) const {
    Span span;
    for (Index j = 0; j < panels_; ++j) {
      for (Index q = 0; q < packets(j); ++q) {
        Largest largest;
        split_pairs(room(K_), parts_, packet_of(to, j, q), [&](Index k) {
          const Row columns = k < K_ ? row(j, q, k) : Row{nullptr, 0};
          const __m512 values =
              columns.from ? load16(columns.from, columns.n) : _mm512_setzero_ps();
          largest.add(values);
          return values;
        });
        alignas(64) std::uint32_t lanes[16];
        _mm512_store_si512(lanes, largest.lanes);
        for (const std::uint32_t most : lanes) span.add(most);
      }
    }
    begin(to, span);
  }
  // As rows: those of packet q of panel j begin at row(j, q), the first n of them, K values each.
  template <class Packets, class RowOf>
  void pack_rows(float* to, Packets&& packets, RowOf&& row) const {
    Span span;
    for (Index j = 0; j < panels_; ++j) {
      for (Index q = 0; q < packets(j); ++q) {
        const Row rows = row(j, q);
        Bfloat16* tile = packet_of(to, j, q);
        Largest largest[16];
        for (Index k = 0; k < K_; k += part_depth, tile += parts_ * part_tile) {
          Split lines[16];
          for (Index lane = 0; lane < 16; ++lane) {
            const bool there = lane < rows.n;
            const float* const from = rows.from + lane * K_ + k;
            Split& line = lines[lane];
            line.low = there ? load16(from, K_ - k) : _mm512_setzero_ps();
            line.high = there ? load16(from + 16, K_ - k - 16) : _mm512_setzero_ps();
            largest[lane].add(line.low);
            largest[lane].add(line.high);
          }
          for (int part = 0; part < parts_; ++part) {
            split_turned(lines, tile + part * part_tile);
          }
        }
        for (const Largest& one : largest) span.add(one.all());
      }
    }
    begin(to, span);
  }
  static Span span(const float* packed) {
    Span span;
    std::memcpy(static_cast<void*>(&span), packed, sizeof(span));
    return span;
  }

  // Values of a row of a.
  static Index room(Index K) { return padded(K, part_depth); }

  Index depth() const { return K_; }

  // Calls pack() unless that has been done since the parts were packed. Others wait: it is short.
  template <class Pack>
  static void once(const float* packed, Pack&& pack) {
    int* const state = const_cast<int*>(reinterpret_cast<const int*>(packed)) + state_at;
    int expected = unpacked;
    if (__atomic_load_n(state, __ATOMIC_ACQUIRE) == ready) return;
    if (__atomic_compare_exchange_n(state, &expected, packing, false, __ATOMIC_ACQUIRE,
                                    __ATOMIC_ACQUIRE)) {
      pack();
      __atomic_store_n(state, ready, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(state, __ATOMIC_ACQUIRE) != ready) _mm_pause();
  }

  // sums = start, or sums if that is null, plus a times panel j, of Q packets; of the values
  // [begin, end) of a row, where a tile begins.
  void multiply(const PartProducts& products, Index rows, const Bfloat16* a, Index a_rows,
                const float* packed, Index j, Index Q, float* sums, Index sums_row,
                const float* start, Index begin, Index end) const {
    const Index at = begin * part_rows * parts_;
    products.multiply({parts_, rows, static_cast<int>(Q), padded(end - begin, products.depth), 1,
                       a + at, 0, a_rows, part_depth,
                       parts_of(packed) + j * packets_ * packet() + at, 0, packet(), sums, sums_row,
                       start});
  }

 private:
  static constexpr Index header = 16;  // of floats: a cache line
  static constexpr Index state_at = sizeof(Span) / sizeof(int);
  static constexpr int unpacked = 0, packing = 1, ready = 2;
  static_assert(sizeof(Span) + sizeof(int) <= header * sizeof(float));

  static void begin(float* to, const Span& span) {
    const int state = unpacked;
    std::memcpy(to, &span, sizeof(span));
    std::memcpy(to + state_at, &state, sizeof(state));
  }
  Bfloat16* packet_of(float* to, Index j, Index q) const {
    return parts_of(to) + (j * packets_ + q) * packet();
  }
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
