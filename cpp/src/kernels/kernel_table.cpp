// Compiled once an instruction set, with that set's flags; see cmake/IsaTargets.cmake.
#include "kernels/kernel_table.h"

#include "kernels/bfloat16.h"
#include "kernels/rows.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

extern const LayerKernels<float> layer_f32;   // layer_f32.cpp
extern const LayerKernels<double> layer_f64;  // layer_f64.cpp

namespace {

// How far ahead the values are fetched: they come from memory, and faster than the processor itself
// would ask for them.
constexpr Index bytes_ahead = 2 << 10;

template <class From, class To>
void convert(const From* from, Index n, To* to) {
  constexpr Index line = 64 / Index(sizeof(From));
  static_assert(line % float_lanes == 0);
  Index i = 0;
  for (; i + line <= n; i += line) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + i) + bytes_ahead);
    for (Index k = i; k < i + line; k += float_lanes) store(to + k, load(from + k));
  }
  for (; i < n; i += float_lanes) {
    const Index left = n - i < float_lanes ? n - i : float_lanes;
    store(to + i, load(from + i, left), left);
  }
}

}  // namespace

extern const KernelTable table;
const KernelTable table = {
    EIGEN_MAX_STATIC_ALIGN_BYTES,
    &layer_f32,
    &layer_f64,
    rows_kernels<float>(),
    rows_kernels<double>(),
    {convert<Bfloat16, float>, convert<float, Bfloat16>},
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
