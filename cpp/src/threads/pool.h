// Worker threads that sleep when idle.
#pragma once
#include <type_traits>

namespace fastbptt {

// Calls part(context, p) once for each p in [0, parts); the caller works too, and always takes part
// 0. Returns when all are done. Parts may run one after another: workers that other callers use are
// not waited for. What the caller's own parts throw comes out when all workers are done; one that a
// worker runs must not throw.
void run_parts(int parts, void (*part)(void*, int), void* context);

template <class F>
void run_parts(int parts, F&& f) {
  using Body = std::remove_reference_t<F>;
  run_parts(parts, [](void* body, int p) { (*static_cast<Body*>(body))(p); }, &f);
}

}  // namespace fastbptt
