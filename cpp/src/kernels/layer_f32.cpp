// The layer kernels of float32: a file of its own, so that both dtypes are compiled side by side.
#include "kernels/layer.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

extern const LayerKernels<float> layer_f32;
const LayerKernels<float> layer_f32 = layer_kernels<float>();

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
