#include "dispatch/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef FASTBPTT_HAS_avx512
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Products of parts, which go with the kernels of avx512.
namespace amx {
extern const PartProducts part_products;
}
namespace avx512_bf16 {
extern const PartProducts part_products;
}

namespace {

struct Isa {
  const char* name;
  const KernelTable* table;
  const OnlineTable* online;
  const PartProducts* products;
  bool (*supported)();
};

#ifdef FASTBPTT_HAS_avx512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef FASTBPTT_HAS_avx512_bf16
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
#endif

#ifdef FASTBPTT_HAS_amx
// Linux keeps the tile registers from a process until it asks for them; it refuses where a stack
// for signal handlers is too small to save them.
bool has_amx() {
#if defined(FASTBPTT_EMULATE_AMX)
  return has_avx512();
#elif defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  constexpr long request_permission = 0x1023, tile_data = 18;
  static const bool granted = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & amx_bf16) || !(d & amx_tile)) return false;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

// Best first.
const Isa isas[] = {
#ifdef FASTBPTT_HAS_amx
    {"amx", &avx512::table, &avx512::online_table, &amx::part_products, has_amx},
#endif
#ifdef FASTBPTT_HAS_avx512_bf16
    {"avx512_bf16", &avx512::table, &avx512::online_table, &avx512_bf16::part_products,
     has_avx512_bf16},
#endif
#ifdef FASTBPTT_HAS_avx512
    {"avx512", &avx512::table, &avx512::online_table, nullptr, has_avx512},
#endif
#ifdef FASTBPTT_HAS_avx2
    {"avx2", &avx2::table, &avx2::online_table, nullptr,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &baseline::table, &baseline::online_table, nullptr, [] { return true; }},
};

// Those of this machine, best first.
std::vector<const Isa*> supported() {
  std::vector<const Isa*> found;
  for (const Isa& isa : isas) {
    if (isa.supported()) found.push_back(&isa);
  }
#ifdef FASTBPTT_HAS_avx512_bf16
  // With Intel's vectors a step of bfloat16 takes 1.6 times as long as one of float32.
  const auto at = std::find_if(found.begin(), found.end(), [](const Isa* isa) {
    return isa->products == &avx512_bf16::part_products;
  });
  if (__builtin_cpu_is("intel") && found.end() - at > 1) std::iter_swap(at, at + 1);
#endif
  return found;
}

const Isa& choose() {
  const char* forced = std::getenv("FASTBPTT_ISA");
  std::string available;
  for (const Isa* isa : supported()) {
    if (!forced || !*forced || std::string(forced) == isa->name) return *isa;
    available += (available.empty() ? "" : ", ") + std::string(isa->name);
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

const PartProducts* part_products() { return chosen().products; }

namespace {
std::atomic<MatmulPrecision> matmul_precision{MatmulPrecision::highest};
}

void set_float32_matmul_precision(MatmulPrecision precision) {
  if (precision != MatmulPrecision::as_set) matmul_precision = precision;
}
MatmulPrecision get_float32_matmul_precision() { return matmul_precision; }

void to_bfloat16(const float* from, Index n, Bfloat16* to) {
  kernels().bfloat16.narrow(from, n, to);
}

CpuInfo cpu_info() {
  CpuInfo info;
  info.isa = chosen().name;
  info.vector_bytes = kernels().vector_bytes;
  for (const Isa& isa : isas) info.built.push_back(isa.name);
  for (const Isa* isa : supported()) info.available.push_back(isa->name);
  return info;
}

}  // namespace fastbptt
