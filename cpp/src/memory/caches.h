// What the code takes for granted of a processor's caches, and how it asks them for something.
#pragma once
#include "fastbptt/types.h"

namespace fastbptt {

// Of most processors, a core's own: weights of more bytes do not stay there from step to step, nor
// results until somebody reads them.
constexpr Index second_cache = Index(1) << 20;

// n values that will be read or written soon, where rows lie so far from each other that the
// processor does not see which is next. Inlined, as a function that does only this looks to the
// compiler as if it did nothing.
template <class T>
__attribute__((always_inline)) inline void fetch(const T* from, Index n) {
  constexpr Index line = 64 / Index(sizeof(T));
  for (Index i = 0; i < n; i += line) __builtin_prefetch(from + i);
  __builtin_prefetch(from + n - 1);
}

}  // namespace fastbptt
