// Compiled once an instruction set, with that set's flags; see cmake/IsaTargets.cmake.
#include "online/online_kernels.h"

#include "online/influence.h"
#include "online/rank_one.h"
#include "online/traces.h"

namespace fastbptt {
namespace FASTBPTT_ISA {

template <class S>
constexpr OnlineKernels<S> online_kernels() {
  return {
      &online_step<S>,  &online_jacobian<S>,    influence_width<S>,  &online_influence<S>,
      &online_trace<S>, &add_input_gradient<S>, &online_rank_one<S>,
  };
}

extern const OnlineTable online_table;
const OnlineTable online_table = {online_kernels<float>(), online_kernels<double>()};

}  // namespace FASTBPTT_ISA
}  // namespace fastbptt
