// The machine: instruction sets and threads.
#pragma once
#include <string>
#include <vector>

#include "fastbptt/types.h"

namespace fastbptt {

struct CpuInfo {
  std::string isa;                     // the one that runs
  std::vector<std::string> available;  // those this CPU can run, best first
  std::vector<std::string> built;      // those in this build, best first
  int vector_bytes;
};

// The first call chooses: the best that the CPU can run, or the one that FASTBPTT_ISA names.
// Throws std::invalid_argument if that one is not available.
CpuInfo cpu_info();

// Threads of one call. Defaults to FASTBPTT_NUM_THREADS, or else the CPUs of the process's
// affinity mask. set throws std::invalid_argument below 1 or above max_threads.
constexpr int max_threads = 1024;
void set_num_threads(int n);
int get_num_threads();

// Of stacks that say nothing else, in sessions that begin from now on. Highest at first; as_set
// leaves it as it is.
void set_float32_matmul_precision(MatmulPrecision precision);
MatmulPrecision get_float32_matmul_precision();

// The nearest bfloat16 of each of n values, of two as near the even one.
void to_bfloat16(const float* from, Index n, Bfloat16* to);

// While it lives, the calls that this thread makes have so many threads, whatever the setting.
class ThreadLimit {
 public:
  explicit ThreadLimit(int n);
  ~ThreadLimit();
  ThreadLimit(const ThreadLimit&) = delete;
  ThreadLimit& operator=(const ThreadLimit&) = delete;

 private:
  int before_;
};

}  // namespace fastbptt
