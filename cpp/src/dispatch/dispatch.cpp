#include "dispatch/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "fastbptt/runtime.h"

namespace fastbptt {

// One a set of kernel objects; IsaTargets.cmake says which are in the build.
namespace avx512 {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace baseline {
extern const KernelTable table;
}

namespace {

struct Isa {
  const KernelTable* table;
  bool (*supported)();
};

// Best first.
const Isa isas[] = {
#ifdef FASTBPTT_HAS_avx512
    {&avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef FASTBPTT_HAS_avx2
    {&avx2::table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&baseline::table, [] { return true; }},
};

const KernelTable& choose() {
  const char* forced = std::getenv("FASTBPTT_ISA");
  std::string available;
  for (const Isa& isa : isas) {
    if (!isa.supported()) continue;
    if (!forced || !*forced || std::string(forced) == isa.table->name) return *isa.table;
    available += (available.empty() ? "" : ", ") + std::string(isa.table->name);
  }
  throw std::invalid_argument("FASTBPTT_ISA: got '" + std::string(forced) +
                              "', wanted one that this machine and build have: " + available);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

CpuInfo cpu_info() {
  CpuInfo info;
  info.isa = kernels().name;
  info.vector_bytes = kernels().vector_bytes;
  for (const Isa& isa : isas) {
    info.built.push_back(isa.table->name);
    if (isa.supported()) info.available.push_back(isa.table->name);
  }
  return info;
}

}  // namespace fastbptt
