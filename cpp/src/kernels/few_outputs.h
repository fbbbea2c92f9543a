// A linear readout with so few outputs that a panel would be mostly zeros: dot products along the
// rows of x, and sums of rows. It does what `Rows` does, with the weight [N][K] and then the bias
// as the only panel, and sums [rows][N].
#pragma once
#include "kernels/micro_kernel.h"
#include "kernels/packet.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
class FewOutputs {
  static constexpr Index p = lanes<S>;

 public:
  static constexpr Index most = 4;

  FewOutputs(Index K, Index N) : K_(K), N_(N) {}

  Index packed() const { return N_ * K_ + N_; }
  void pack(const S* weight, const S* bias, S* packed) const {
    for (Index i = 0; i < N_ * K_; ++i) packed[i] = weight[i];
    for (Index j = 0; j < N_; ++j) packed[N_ * K_ + j] = bias ? bias[j] : S(0);
  }
  void unpack(const S* packed, S* weight, S* bias) const {
    for (Index i = 0; i < N_ * K_; ++i) weight[i] = packed[i];
    for (Index j = 0; bias && j < N_; ++j) bias[j] = packed[N_ * K_ + j];
  }
  Index columns() const { return N_ * K_; }
  void pack_columns(const S* weight, S* to) const {
    for (Index i = 0; i < N_ * K_; ++i) to[i] = weight[i];
  }
  Index sums(Index stride) const { return stride * N_; }
  Index panels() const { return 1; }

  void multiply(Index row, Index n, Index, const S* x, const S* packed, S* sums) const {
    with_constant<most>(N_, [&](auto N) {
      for (Index r = 0; r < n; ++r, x += K_) {
        Packet<S> dot[N];
        for (int j = 0; j < N; ++j) dot[j] = constant<S>(0);
        const auto add = [&](Index k, Index valid) {
          const Packet<S> value = load(x + k, valid);
          for (int j = 0; j < N; ++j) {
            dot[j] = pmadd(load(packed + j * K_ + k, valid), value, dot[j]);
          }
        };
        for_packets(0, K_, add);
        S* const to = sums + (row + r) * N;
        for (int j = 0; j < N; ++j) {
          to[j] = packed[N * K_ + j] + Eigen::internal::predux(dot[j]);
        }
      }
    });
  }
  void read(Index row, Index n, Index, const S* sums, S* y, Index step) const {
    for (Index r = 0; r < n; ++r)
      for (Index j = 0; j < N_; ++j) y[r * step + j] = sums[(row + r) * N_ + j];
  }
  void write(Index row, Index n, Index, const S* y, Index step, S* sums) const {
    for (Index r = 0; r < n; ++r)
      for (Index j = 0; j < N_; ++j) sums[(row + r) * N_ + j] = y[r * step + j];
  }

  void grad_x(Index row, Index n, Index, const S* sums, const S* columns, S*, S* to) const {
    with_constant<most>(N_, [&](auto N) {
      for (Index r = 0; r < n; ++r, to += K_) {
        const S* const grads = sums + (row + r) * N;
        const auto write = [&](Index k, Index valid) {
          Packet<S> sum = pmul(pset1<Packet<S>>(grads[0]), load(columns + k, valid));
          for (int j = 1; j < N; ++j) {
            sum = pmadd(pset1<Packet<S>>(grads[j]), load(columns + j * K_ + k, valid), sum);
          }
          store(to + k, sum, valid);
        };
        for_packets(0, K_, write);
      }
    });
  }

  void add_gradient(Index n, Index, const S* x, const S* sums, Index, Index, Index from, Index to,
                    S* gradient) const {
    with_constant<most>(N_, [&](auto N) {
      // As many packets of columns side by side as leave none of the sums waiting for itself.
      constexpr int together = tile_rows(N) / 2;
      Index k = from;
      for (; k + together * p <= to; k += together * p) {
        add_columns<N, together>(n, p, x + k, sums, gradient + k);
      }
      for_packets(k, to, [&](Index first, Index valid) {
        add_columns<N, 1>(n, valid, x + first, sums, gradient + first);
      });
      S* const bias = gradient + N * K_;
      for (Index r = n - 1; r >= 0 && from == 0; --r) {
        for (int j = 0; j < N; ++j) bias[j] += sums[r * N + j];
      }
    });
  }

 private:
  // Calls body(first, valid) for packets that cover columns [begin, end).
  template <class F>
  static FASTBPTT_INLINE void for_packets(Index begin, Index end, F&& body) {
    Index k = begin;
    for (; k + p <= end; k += p) body(k, p);
    if (k < end) body(k, end - k);
  }

  // `valid` columns of the last packet, and all of the others.
  template <int N, int Q>
  void add_columns(Index n, Index valid, const S* x, const S* grads, S* to) const {
    Packet<S> sums[N][Q];
    for (int j = 0; j < N; ++j)
      for (int q = 0; q < Q; ++q) sums[j][q] = load(to + j * K_ + q * p, valid);
    for (Index r = n - 1; r >= 0; --r) {
      Packet<S> values[Q];
      for (int q = 0; q < Q; ++q) values[q] = load(x + r * K_ + q * p, valid);
      for (int j = 0; j < N; ++j) {
        const Packet<S> grad = pset1<Packet<S>>(grads[r * N + j]);
        for (int q = 0; q < Q; ++q) sums[j][q] = pmadd(grad, values[q], sums[j][q]);
      }
    }
    for (int j = 0; j < N; ++j)
      for (int q = 0; q < Q; ++q) store(to + j * K_ + q * p, sums[j][q], valid);
  }

  const Index K_, N_;
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
