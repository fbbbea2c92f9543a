// Worker threads that sleep when idle.
#pragma once
#include <atomic>
#include <type_traits>

namespace fastbptt {

// A thread should have at least this much to do, or waking it costs more than it brings.
constexpr double flops_a_thread = 1e6;

// CPUs that this process may run on, 1 to max_threads.
int usable_cpus();

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

// Calls body(context, rank, size) on size <= wanted threads, the caller as rank 0, that all run at
// the same time, so that they may wait for each other. Fewer are there when the machine gives no
// more. The body must not throw.
void run_team(int wanted, void (*body)(void*, int rank, int size), void* context);

template <class F>
void run_team(int wanted, F&& f) {
  using Body = std::remove_reference_t<F>;
  run_team(
      wanted, [](void* body, int rank, int size) { (*static_cast<Body*>(body))(rank, size); }, &f);
}

// Where the threads of a team wait for each other, many times. They spin, for a step of a recurrent
// layer takes microseconds, and give way when that was not enough.
class Barrier {
 public:
  void wait(int size);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

}  // namespace fastbptt
