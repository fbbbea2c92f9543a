// The kernels of the instruction set that runs.
#pragma once
#include "kernels/kernel_table.h"
#include "kernels/part_products.h"
#include "online/online_kernels.h"

namespace fastbptt {

// Chosen once a process; see cpu_info.
const KernelTable& kernels();
const OnlineTable& online_table();
// Null where the instruction set has none.
const PartProducts* part_products();

}  // namespace fastbptt
