#include "threads/pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fastbptt/runtime.h"

namespace fastbptt {
namespace {

// One parallel region. It lives on the caller's stack, so a worker counts itself out of `inside`
// as its last touch of it, and the caller leaves only when nobody is inside.
struct Region {
  void (*part)(void*, int);
  void* context;
  int parts;
  std::atomic<int> next{1};  // part 0 is the caller's
  std::atomic<int> inside{0};

  void work() {
    for (int p; (p = next.fetch_add(1, std::memory_order_relaxed)) < parts;) part(context, p);
  }
};

class Pool {
 public:
  void run(Region& region) {
    const int helpers = post(region);
    region.part(region.context, 0);
    region.work();
    withdraw(region, helpers);
    // What is left is the tail of parts that workers have begun: short beside the call.
    while (region.inside.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  }

 private:
  // Offers the region to idle workers, starting new ones where there are too few.
  int post(Region& region) {
    const int wanted = region.parts - 1;
    std::lock_guard<std::mutex> lock(mutex_);
    while (idle_ - static_cast<int>(offers_.size()) < wanted && workers_ < max_threads - 1) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        break;  // no more threads to be had: the caller does the rest
      }
      ++workers_;
      ++idle_;
    }
    const int offered = std::clamp(idle_ - static_cast<int>(offers_.size()), 0, wanted);
    offers_.insert(offers_.end(), offered, &region);
    for (int i = 0; i < offered; ++i) wake_.notify_one();
    return offered;
  }

  // Takes back the offers that nobody has taken up.
  void withdraw(Region& region, int offered) {
    if (offered == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    offers_.erase(std::remove(offers_.begin(), offers_.end(), &region), offers_.end());
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !offers_.empty(); });
      Region* region = offers_.back();
      offers_.pop_back();
      --idle_;
      region->inside.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      region->work();
      region->inside.fetch_sub(1, std::memory_order_release);
      lock.lock();
      ++idle_;
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Region*> offers_;
  int workers_ = 0;
  int idle_ = 0;
};

// Never destroyed: its threads are detached and may outlive static destructors. A forked child has
// none of the threads, so it starts with a pool of its own.
Pool* pool = nullptr;
std::once_flag pool_once;

Pool& the_pool() {
  std::call_once(pool_once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

int default_threads() {
  if (const char* text = std::getenv("FASTBPTT_NUM_THREADS")) {
    char* end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || n < 1 || n > max_threads) {
      throw std::invalid_argument("FASTBPTT_NUM_THREADS: got '" + std::string(text) +
                                  "', wanted a whole number from 1 to " +
                                  std::to_string(max_threads));
    }
    return static_cast<int>(n);
  }
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

std::atomic<int> threads{0};

}  // namespace

void run_parts(int parts, void (*part)(void*, int), void* context) {
  if (parts <= 0) return;
  if (parts == 1) return part(context, 0);
  Region region{part, context, parts};
  the_pool().run(region);
}

void set_num_threads(int n) {
  if (n < 1 || n > max_threads) {
    throw std::invalid_argument("n: got " + std::to_string(n) + ", wanted from 1 to " +
                                std::to_string(max_threads));
  }
  threads = n;
}

int get_num_threads() {
  int n = threads;
  if (n == 0) {
    n = default_threads();
    threads = n;
  }
  return n;
}

}  // namespace fastbptt
