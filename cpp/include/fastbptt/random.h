// The random numbers of the library: Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011). A number is a function of a key and of where it is used,
// so it is the same in whatever order, on whichever thread and however often it is drawn.
//
// All is inlined, as kernels of several instruction sets use it; the loops over lanes are what a
// compiler makes vectors of.
#pragma once
#include <cstdint>

#include "fastbptt/types.h"

namespace fastbptt {

// Blocks of four words each: word w of block i is words[w * lanes + i]. A round:
//
//   (w0, w1, w2, w3)  ->  (high(M1 w2) ^ w1 ^ k0, low(M1 w2), high(M0 w0) ^ w3 ^ k1, low(M0 w0))
//
// Ten of them make the generator; the key grows by constants from round to round.
template <int lanes>
__attribute__((always_inline)) inline void philox(std::uint32_t* words, std::uint64_t key) {
  std::uint32_t *const w0 = words, *const w1 = w0 + lanes, *const w2 = w1 + lanes,
                       *const w3 = w2 + lanes;
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < lanes; ++i) {
      const std::uint64_t a = std::uint64_t(0xD2511F53) * w0[i];
      const std::uint64_t b = std::uint64_t(0xCD9E8D57) * w2[i];
      w0[i] = static_cast<std::uint32_t>(b >> 32) ^ w1[i] ^ k0;
      w1[i] = static_cast<std::uint32_t>(b);
      w2[i] = static_cast<std::uint32_t>(a >> 32) ^ w3[i] ^ k1;
      w3[i] = static_cast<std::uint32_t>(a);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

// What a number is drawn for: each use has numbers of its own.
enum class Draw : std::uint32_t { dropout, recurrent_dropout, zoneout_h, zoneout_c, sign };

// The place of the numbers of one row. Layer l is number l for what it gives, all directions side
// by side, and l * D + d for what happens inside one of its directions.
struct Place {
  Draw draw;
  Index layer;
  Index step = 0;  // of the whole sequence; 0 where one draw is for all of time
  Index row = 0;   // of the batch as the caller ordered it
};

// Numbers that are drawn together: those of units [64 g, 64 g + 64), for any g.
constexpr Index draw_group = 64;

// Unit 64 g + 16 w + i has word w of block 16 g + i. The counter's words: block, row, step, and
// draw, layer and the upper part of the step.
__attribute__((always_inline)) inline void draw_words(std::uint64_t key, const Place& place,
                                                      Index group, std::uint32_t* words) {
  const auto step = static_cast<std::uint64_t>(place.step);
  const std::uint32_t rest = static_cast<std::uint32_t>(place.draw) << 28 |
                             (static_cast<std::uint32_t>(place.layer) & 0xFFF) << 16 |
                             (static_cast<std::uint32_t>(step >> 32) & 0xFFFF);
  for (int i = 0; i < 16; ++i) {
    words[i] = static_cast<std::uint32_t>(group * 16 + i);
    words[16 + i] = static_cast<std::uint32_t>(place.row);
    words[32 + i] = static_cast<std::uint32_t>(step);
    words[48 + i] = rest;
  }
  philox<16>(words, key);
}

// The numbers under this, of 2^32, drop a unit with probability p. For p = 1 one is missing: where
// p may be 1, what is kept must be zero then.
__attribute__((always_inline)) inline std::uint32_t drop_threshold(double p) {
  const double below = p * 4294967296.0;
  return below < 4294967295.0 ? static_cast<std::uint32_t>(below) : 4294967295u;
}

// Calls use(i, kept) for each unit i in [0, n); each is dropped with probability p.
template <class F>
__attribute__((always_inline)) inline void draw_units(std::uint64_t key, const Place& place,
                                                      double p, Index n, F&& use) {
  const std::uint32_t threshold = drop_threshold(p);
  for (Index first = 0; first < n; first += draw_group) {
    std::uint32_t words[draw_group];
    draw_words(key, place, first / draw_group, words);
    if (n - first >= draw_group) {
      for (Index i = 0; i < draw_group; ++i) use(first + i, words[i] >= threshold);
    } else {
      for (Index i = 0; i < n - first; ++i) use(first + i, words[i] >= threshold);
    }
  }
}

// mask[i] is `kept` with probability 1 - p, and else 0.
template <class S>
__attribute__((always_inline)) inline void draw_mask(std::uint64_t key, const Place& place,
                                                     double p, S kept, Index n, S* mask) {
  draw_units(key, place, p, n, [&](Index i, bool keep) __attribute__((always_inline)) {
    mask[i] = keep ? kept : S(0);
  });
}

}  // namespace fastbptt
