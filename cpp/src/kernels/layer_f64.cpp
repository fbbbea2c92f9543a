// The layer kernels of float64.
#include "kernels/layer.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

extern const LayerKernels<double> layer_f64;
const LayerKernels<double> layer_f64 = layer_kernels<double>();

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
