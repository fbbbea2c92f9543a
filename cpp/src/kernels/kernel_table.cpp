// Compiled once an instruction set, with that set's flags; see cmake/IsaTargets.cmake.
#include "kernels/kernel_table.h"

#include "kernels/layer.h"
#include "kernels/rows.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

extern const KernelTable table;
const KernelTable table = {
    EIGEN_MAX_STATIC_ALIGN_BYTES, layer_kernels<float>(), layer_kernels<double>(),
    rows_kernels<float>(),        rows_kernels<double>(),
};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
