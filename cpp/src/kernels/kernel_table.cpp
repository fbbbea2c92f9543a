// Compiled once an instruction set, with that set's flags; see cmake/IsaTargets.cmake.
#include "kernels/kernel_table.h"

#include "kernels/rows.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

extern const LayerKernels<float> layer_f32;   // layer_f32.cpp
extern const LayerKernels<double> layer_f64;  // layer_f64.cpp

extern const KernelTable table;
const KernelTable table = {
    EIGEN_MAX_STATIC_ALIGN_BYTES, &layer_f32, &layer_f64, rows_kernels<float>(),
    rows_kernels<double>(),
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
