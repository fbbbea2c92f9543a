// Compiled once an instruction set, with that set's flags; see cmake/IsaTargets.cmake.
#include "kernels/kernel_table.h"

#include "kernels/bfloat16.h"
#include "kernels/rows.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

extern const LayerKernels<float> layer_f32;   // layer_f32.cpp
extern const LayerKernels<double> layer_f64;  // layer_f64.cpp

namespace {

template <class From, class To>
void convert(const From* from, Index n, To* to) {
  Index i = 0;
  for (; i + float_lanes <= n; i += float_lanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
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
