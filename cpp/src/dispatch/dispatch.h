// The kernels of the instruction set that runs.
#pragma once
#include "kernels/kernel_table.h"

namespace fastbptt {

// Chosen once a process; see cpu_info.
const KernelTable& kernels();

}  // namespace fastbptt
