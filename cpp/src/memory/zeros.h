// Zeros over memory that is not read soon: past the caches, where the processor has stores that go
// there. To write it through them would be to read it first, and to lose what lies in them.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fastbptt {

// To be followed by `zeros_written` before another thread reads them.
inline void write_zeros(void* to, std::size_t bytes) {
  char* at = static_cast<char*>(to);
#ifdef __SSE2__
  // Whole cache lines only: of others the rest would be read first.
  constexpr std::size_t line = 64;
  const std::size_t before =
      std::min(bytes, (line - reinterpret_cast<std::uintptr_t>(at) % line) % line);
  std::memset(at, 0, before);
  for (at += before, bytes -= before; bytes >= line; at += line, bytes -= line) {
    for (std::size_t i = 0; i < line; i += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(at + i), _mm_setzero_si128());
    }
  }
#endif
  std::memset(at, 0, bytes);
}

inline void zeros_written() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace fastbptt
