// Weights in panels, the layout in which the register tile reads them.
//
// The hidden units are cut into blocks of one packet. A panel is a block's gates side by side, or,
// for a cell with one gate, four blocks side by side (`wide`). For each panel, one after another:
//
//   forward:  bias [packets][p], then W_ih^T [I][x_count][p], then W_hh^T [H][h_count][p]
//   gradients of the weights: the same, so that they can be added up where they are
//
// Units beyond H are zero. The reverse multiplies by the weights, not by their transposes, so there
// a panel is up to four packets of the output (hidden units, or input values), and its rows follow
// the gate gradients: panel by panel, packet by packet, lane by lane.
#pragma once
#include "cells/unit.h"
#include "kernels/kernel_table.h"
#include "kernels/packet.h"
#include "memory/caches.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

// Bytes of a panel that stay in the first caches while tile after tile of rows goes by. More than
// L1 holds: what is read in order comes from L2 in time, of which there is a megabyte and more
// beside wide vectors.
constexpr Index panel_bytes = (sizeof(Packet<float>) == 64 ? 96 : 48) * 1024;

// Whether every other step goes through its panels from the last to the first, and so begins with
// what is still in the cache: where the rows are a single tile, as each panel is left as soon as it
// is read, and where they are two and the second cache holds a part of the weights. With more rows
// the panels come in time, and order gains nothing.
constexpr bool turns_back(Index rows, Index tile, Index weights) {
  return rows <= tile ||
         (rows <= 2 * tile && weights >= second_cache && weights < 4 * second_cache);
}

// A run of a panel's packets: those of the input product, or of the recurrent product.
struct Range {
  int first;
  int count;
  bool recurrent = false;
};

template <class Cell>
constexpr Range x_range{Cell::x_first, Cell::x_count};
template <class Cell>
constexpr Range h_range{Cell::h_first, Cell::h_count, true};
constexpr Range all_packets{0, 4};

// The part of a cell that Panels looks at, for a product that stands by itself: N outputs in panels
// of four packets, from K inputs.
struct ProductPanel {
  static constexpr bool wide = true;
  static constexpr Second second = Second::none;
  static constexpr int packets = 4;
  static constexpr int x_first = 0, x_count = 4, h_first = 0, h_count = 0;
  static constexpr int gate[] = {0, 0, 0, 0};
};

// Between rows of a weight and a packet of a panel. Not inlined: they do not depend on the cell,
// and inlined a tenth of the library's code was copies of them.
//
// to[k * step + lane] = rows[lane * row + k] for k < n; zeros in the lanes from valid on.
template <class S>
__attribute__((noinline)) void pack_packet(const S* rows, Index row, Index valid, Index n, S* to,
                                           Index step) {
  constexpr Index p = lanes<S>;
  Index k = 0;
  if (valid == p) {
    // p x p blocks are transposed in registers.
    for (; k + p <= n; k += p) {
      Eigen::internal::PacketBlock<Packet<S>, int(p)> block;
      for (Index lane = 0; lane < p; ++lane) block.packet[lane] = load(rows + lane * row + k);
      Eigen::internal::ptranspose(block);
      for (Index i = 0; i < p; ++i) store(to + (k + i) * step, block.packet[i]);
    }
  }
  for (; k < n; ++k)
    for (Index lane = 0; lane < p; ++lane)
      to[k * step + lane] = lane < valid ? rows[lane * row + k] : S(0);
}

// rows[lane * columns + k] = from[k * step + lane], for the valid lanes, or added.
template <class S>
__attribute__((noinline)) void unpack_packet(const S* from, Index step, Index valid, Index columns,
                                             bool add, S* rows) {
  constexpr Index p = lanes<S>;
  Index k = 0;
  if (valid == p) {
    for (; k + p <= columns; k += p) {
      Eigen::internal::PacketBlock<Packet<S>, int(p)> block;
      for (Index i = 0; i < p; ++i) block.packet[i] = load(from + (k + i) * step);
      Eigen::internal::ptranspose(block);
      for (Index lane = 0; lane < p; ++lane) {
        S* const to = rows + lane * columns + k;
        store(to, add ? padd(load(to), block.packet[lane]) : block.packet[lane]);
      }
    }
  }
  for (; k < columns; ++k) {
    for (Index lane = 0; lane < valid; ++lane) {
      S& to = rows[lane * columns + k];
      to = (add ? to : S(0)) + from[k * step + lane];
    }
  }
}

// to[lane * width + i] = rows[lane * row + i] for i < valid and lane < filled; zeros elsewhere in
// the packet's rows of `width`.
template <class S>
__attribute__((noinline)) void copy_packet(const S* rows, Index row, Index filled, Index valid,
                                           Index width, S* to) {
  for (Index lane = 0; lane < lanes<S>; ++lane, to += width) {
    const Index n = lane < filled ? valid : 0;
    for (Index i = 0; i < n; ++i) to[i] = rows[lane * row + i];
    for (Index i = n; i < width; ++i) to[i] = S(0);
  }
}

template <class S, class Cell>
struct Panels {
  static constexpr Index p = lanes<S>;
  Index I;
  Index H;
  Index R;  // values of h'

  explicit Panels(const LayerShape& s) : I(s.input_size), H(s.hidden_size), R(s.output_size()) {}

  Index blocks() const { return ceil_div(H, p); }
  Index count() const { return Cell::wide ? ceil_div(blocks(), 4) : blocks(); }
  // Packets of panel j.
  Index packets(Index j) const {
    return Cell::wide && blocks() - 4 * j < 4 ? blocks() - 4 * j : Cell::packets;
  }
  Index packets(Index j, Range range) const { return Cell::wide ? packets(j) : range.count; }
  // The hidden units of packet q of panel j, and how many of them there are.
  Index unit(Index j, Index q) const { return (Cell::wide ? 4 * j + q : j) * p; }
  Index units(Index unit) const { return valid(H, unit); }
  // Whether all packets of panel j are full of units.
  bool whole(Index j) const { return j < count() - 1 || H % p == 0; }
  // Of a packet that begins at column `first`, the lanes that are columns.
  static Index valid(Index columns, Index first) {
    return columns - first < p ? columns - first : p;
  }
  // The row of PyTorch's weight behind lane 0 of packet q of panel j.
  Index weight_row(Index j, Index q) const { return Cell::gate[q] * H + unit(j, q); }

  Index bias_size() const { return Cell::packets * p; }
  Index x_size() const { return I * Cell::x_count * p; }
  Index h_size() const { return R * Cell::h_count * p; }
  Index panel_size() const { return bias_size() + x_size() + h_size(); }
  Index size() const { return count() * panel_size(); }

  // Of the panels that start at `data`, panel j's parts. Steps from k to k + 1 are packets(j,
  // range) * p.
  template <class T>
  T* bias(T* data, Index j) const {
    return data + j * panel_size();
  }
  template <class T>
  T* x(T* data, Index j) const {
    return bias(data, j) + bias_size();
  }
  template <class T>
  T* h(T* data, Index j) const {
    return x(data, j) + x_size();
  }

  // panel[k][q][lane] = weight[row(q) + lane][k] for the range's packets of panel j.
  __attribute__((noinline)) void pack(const S* weight, Index columns, Index j, Range range,
                                      S* panel) const {
    const Index n = packets(j, range);
    for (Index q = 0; q < n; ++q) {
      const Index valid = units(unit(j, range.first + q));
      const S* rows = weight + weight_row(j, range.first + q) * columns;
      pack_packet(rows, columns, valid, columns, panel + q * p, n * p);
    }
  }

  // What panels of gradients hold, to PyTorch's layout: written there, or added to what is there.
  __attribute__((noinline)) void unpack(const S* panel, Index columns, Index j, Range range,
                                        bool add, S* weight) const {
    const Index n = packets(j, range);
    for (Index q = 0; q < n; ++q) {
      const Index valid = units(unit(j, range.first + q));
      S* rows = weight + weight_row(j, range.first + q) * columns;
      unpack_packet<S>(panel + q * p, n * p, valid, columns, add, rows);
    }
  }

  __attribute__((noinline)) void add_bias(const S* bias, Index j, Index q, S* to) const {
    if (!bias) return;
    const Index valid = units(unit(j, q));
    for (Index lane = 0; lane < valid; ++lane) to[q * p + lane] += bias[weight_row(j, q) + lane];
  }
  static bool takes_x(Index q) { return q >= Cell::x_first && q < Cell::x_first + Cell::x_count; }
  static bool takes_h(Index q) { return q >= Cell::h_first && q < Cell::h_first + Cell::h_count; }
  static bool takes_b_ih(Index q) { return takes_x(q); }
  // b_hh reaches the packets of the recurrent product, the candidate's among them.
  static bool takes_b_hh(Index q) {
    return takes_h(q) || (Cell::second == Second::candidate && q == 0);
  }

  void pack_bias(const Weights<const S>& w, S* to) const {
    for (Index j = 0; j < count(); ++j) {
      S* const sums = bias(to, j);
      for (Index i = 0; i < bias_size(); ++i) sums[i] = S(0);
      for (Index q = 0; q < packets(j); ++q) {
        if (takes_b_ih(q)) add_bias(w.b_ih, j, q, sums);
        if (takes_b_hh(q)) add_bias(w.b_hh, j, q, sums);
      }
    }
  }
  void pack_forward(const Weights<const S>& w, S* to) const {
    for (Index j = 0; j < count(); ++j) {
      pack(w.w_ih, I, j, x_range<Cell>, x(to, j));
      pack(w.w_hh, R, j, h_range<Cell>, h(to, j));
    }
  }

  // Rows of a reverse panel: the gate gradients of the range.
  Index reverse_rows(Range range) const { return blocks() * p * (Cell::wide ? 1 : range.count); }
  static Index reverse_panels(Index columns) { return ceil_div(ceil_div(columns, p), 4); }
  static Index reverse_packets(Index columns, Index panel) {
    const Index left = ceil_div(columns, p) - 4 * panel;
    return left < 4 ? left : 4;
  }
  Index reverse_size(Index columns, Range range) const {
    return reverse_rows(range) * ceil_div(columns, p) * p;
  }
  template <class T>
  T* reverse_panel(T* panels, Range range, Index panel) const {
    return panels + panel * 4 * p * reverse_rows(range);
  }
  __attribute__((noinline)) void pack_reverse(const S* weight, Index columns, Range range,
                                              S* to) const {
    for (Index panel = 0; panel < reverse_panels(columns); ++panel) {
      const Index first = panel * 4 * p, width = reverse_packets(columns, panel) * p;
      const Index valid = columns - first < width ? columns - first : width;
      S* row = reverse_panel(to, range, panel);
      for (Index j = 0; j < count(); ++j) {
        for (Index q = range.first; q < range.first + packets(j, range); ++q) {
          const S* const from = weight + weight_row(j, q) * columns + first;
          copy_packet(from, columns, units(unit(j, q)), valid, width, row);
          row += p * width;
        }
      }
    }
  }
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
