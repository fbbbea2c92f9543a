#include "dispatch/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "fastbptt/runtime.h"

namespace fastbptt {

// One a set of kernel objects; IsaTargets.cmake says which are in the build.
namespace avx512 {
extern const KernelTable table;
extern const OnlineTable online_table;
}  // namespace avx512
namespace avx2 {
extern const KernelTable table;
extern const OnlineTable online_table;
}  // namespace avx2
namespace baseline {
extern const KernelTable table;
extern const OnlineTable online_table;
}  // namespace baseline

namespace {

struct Isa {
  const KernelTable* table;
  const OnlineTable* online;
  bool (*supported)();
};

// Best first.
const Isa isas[] = {
#ifdef FASTBPTT_HAS_avx512
    {&avx512::table, &avx512::online_table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef FASTBPTT_HAS_avx2
    {&avx2::table, &avx2::online_table,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&baseline::table, &baseline::online_table, [] { return true; }},
};

const Isa& choose() {
  const char* forced = std::getenv("FASTBPTT_ISA");
  std::string available;
  for (const Isa& isa : isas) {
    if (!isa.supported()) continue;
    if (!forced || !*forced || std::string(forced) == isa.table->name) return isa;
    available += (available.empty() ? "" : ", ") + std::string(isa.table->name);
  }
  throw std::invalid_argument("FASTBPTT_ISA: got '" + std::string(forced) +
                              "', wanted one that this machine and build have: " + available);
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

const KernelTable& kernels() { return *chosen().table; }

const OnlineTable& online_table() { return *chosen().online; }

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
