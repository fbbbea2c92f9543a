// The tile registers of AMX, eight of 16 rows of 64 bytes, of which all of them are always used.
//
// FASTBPTT_EMULATE_AMX puts plain C++ in the place of the instructions, with their arithmetic, for
// machines without them. It is for tests: a product takes about as long as with a vector of four.
#pragma once
#include <cstdint>
#include <cstring>

#include "fastbptt/types.h"

namespace fastbptt {
namespace amx {

constexpr Index tile_rows = 16;
constexpr Index tile_row_bytes = 64;
// Values of k that one multiplication takes.
constexpr Index tile_depth = 32;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t columns[16] = {};  // bytes
  std::uint8_t rows[16] = {};
};

#ifndef FASTBPTT_EMULATE_AMX

// The compiler knows nothing of these registers, so all is volatile, and keeps its order.

inline void configure() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.columns[tile] = tile_row_bytes;
    config.rows[tile] = tile_rows;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

inline void release() { __asm__ volatile("tilerelease"); }

template <int tile>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int tile>
inline void load(const void* from, Index row_bytes) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(row_bytes)
                   : "memory");
}

template <int tile>
inline void store(void* to, Index row_bytes) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(row_bytes)
                   : "memory");
}

// c += a b, with a in bfloat16 [16][32], b in pairs [16][16][2], c in float32 [16][16].
template <int c, int a, int b>
inline void multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

struct EmulatedTile {
  alignas(64) unsigned char data[tile_rows * tile_row_bytes];
};
inline thread_local EmulatedTile emulated[8];

inline void configure() { std::memset(emulated, 0, sizeof(emulated)); }
// What is read without a configuration is to be seen.
inline void release() { std::memset(emulated, 0xff, sizeof(emulated)); }

template <int tile>
inline void zero() {
  std::memset(emulated[tile].data, 0, sizeof(EmulatedTile));
}

template <int tile>
inline void load(const void* from, Index row_bytes) {
  for (Index r = 0; r < tile_rows; ++r) {
    std::memcpy(emulated[tile].data + r * tile_row_bytes,
                static_cast<const char*>(from) + r * row_bytes, tile_row_bytes);
  }
}

template <int tile>
inline void store(void* to, Index row_bytes) {
  for (Index r = 0; r < tile_rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * row_bytes, emulated[tile].data + r * tile_row_bytes,
                tile_row_bytes);
  }
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float value_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
// Denormals, in and out, are zeros.
inline float flushed(float value) {
  const std::uint32_t bits = bits_of(value);
  return value_of((bits & 0x7f800000u) ? bits : bits & 0x80000000u);
}

// As the pseudo code of TDPBF16PS in Intel's manual has it: the even and the odd values of k are
// two sums, from zero and with fused multiply-adds, rounded to nearest even; then they are added to
// each other, and that to c.
template <int c, int a, int b>
inline void multiply() {
  for (Index m = 0; m < tile_rows; ++m) {
    float even[16] = {}, odd[16] = {};
    for (Index k = 0; k < tile_rows; ++k) {
      std::uint32_t pair, pairs[16];
      std::memcpy(&pair, emulated[a].data + m * tile_row_bytes + 4 * k, sizeof(pair));
      std::memcpy(pairs, emulated[b].data + k * tile_row_bytes, sizeof(pairs));
      const float a_even = flushed(value_of(pair << 16));
      const float a_odd = flushed(value_of(pair & 0xffff0000u));
      for (int n = 0; n < 16; ++n) {
        const float b_even = flushed(value_of(pairs[n] << 16));
        const float b_odd = flushed(value_of(pairs[n] & 0xffff0000u));
        even[n] = flushed(__builtin_fmaf(a_even, b_even, even[n]));
        odd[n] = flushed(__builtin_fmaf(a_odd, b_odd, odd[n]));
      }
    }
    float sums[16];
    unsigned char* const row = emulated[c].data + m * tile_row_bytes;
    std::memcpy(sums, row, sizeof(sums));
    for (int n = 0; n < 16; ++n) {
      sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
    }
    std::memcpy(row, sums, sizeof(sums));
  }
}

#endif

}  // namespace amx
}  // namespace fastbptt
