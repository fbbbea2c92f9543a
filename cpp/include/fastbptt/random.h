// The random numbers of the library: Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011). A number is a function of a key and of where it is used,
// so it is the same in whatever order, on whichever thread and however often it is drawn.
//
// All is inlined, as kernels of several instruction sets use it.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

// As many blocks at once as make up vectors of the instruction set: compilers do not find the
// product of 32 bits by 32 in the loop above.
#if defined(__AVX512F__)
constexpr int random_bytes = 64;
#elif defined(__AVX2__)
constexpr int random_bytes = 32;
#else
constexpr int random_bytes = 16;
#endif
typedef std::uint64_t WordPairs __attribute__((vector_size(random_bytes)));

// The 64-bit products of the lower halves.
__attribute__((always_inline)) inline WordPairs multiply_lower(WordPairs a, std::uint32_t b) {
#if defined(__AVX512F__)
  return (WordPairs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (WordPairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (WordPairs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * std::uint64_t(b);
#endif
}

// philox<16>, two words to a lane of 64 bits.
__attribute__((always_inline)) inline void philox_vectors(std::uint32_t* words, std::uint64_t key) {
  constexpr int vectors = 64 / random_bytes, step = random_bytes / 4;
  constexpr std::uint64_t low = 0xFFFFFFFF;
  WordPairs w[4][vectors];
  for (int k = 0; k < 4; ++k) {
    for (int v = 0; v < vectors; ++v) {
      std::memcpy(&w[k][v], words + k * 16 + v * step, random_bytes);
    }
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t both_k0 = std::uint64_t(k0) << 32 | k0;
    const std::uint64_t both_k1 = std::uint64_t(k1) << 32 | k1;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const WordPairs a = multiply_lower(w[0][v], 0xD2511F53);
      const WordPairs a_odd = multiply_lower(w[0][v] >> 32, 0xD2511F53);
      const WordPairs b = multiply_lower(w[2][v], 0xCD9E8D57);
      const WordPairs b_odd = multiply_lower(w[2][v] >> 32, 0xCD9E8D57);
      w[0][v] = ((b >> 32) | (b_odd & ~low)) ^ w[1][v] ^ both_k0;
      w[1][v] = (b & low) | (b_odd << 32);
      w[2][v] = ((a >> 32) | (a_odd & ~low)) ^ w[3][v] ^ both_k1;
      w[3][v] = (a & low) | (a_odd << 32);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int k = 0; k < 4; ++k) {
    for (int v = 0; v < vectors; ++v) {
      std::memcpy(words + k * 16 + v * step, &w[k][v], random_bytes);
    }
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
  philox_vectors(words, key);
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
