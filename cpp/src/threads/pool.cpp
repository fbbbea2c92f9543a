#include "threads/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fastbptt/runtime.h"

namespace fastbptt {
namespace {

// One parallel region. It lives on the caller's stack: a worker's last touch of it is to count
// itself out of `inside`, and the caller leaves only when nobody is inside.
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

// Looks at a region that workers are about to leave, before the caller goes to sleep.
constexpr int looks = 1000;

// Signals belong to the threads of the program: one that they all block, to wait for it, must not
// find a worker that takes it. Faults of the worker itself stay its own.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// Tells the core that this is a wait.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // With `together`, the region gets as many parts as there are threads for them.
  void run(Region& region, bool together) {
    post(region, together);
    // Also when the caller's part throws: the workers must be out of the region before it is gone.
    const struct Leave {
      Pool& pool;
      Region& region;
      ~Leave() { pool.leave(region); }
    } leave{*this, region};
    region.part(region.context, 0);
    region.work();
  }

 private:
  // Offers the region to idle workers, starting new ones where there are too few.
  void post(Region& region, bool together) {
    int offered = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const int wanted = region.parts - 1;
      if (free_workers() < wanted) start_workers(wanted);
      offered = std::min(free_workers(), wanted);
      offers_.insert(offers_.end(), offered, &region);
      // Nobody has seen the region yet; and each of these offers will be taken up.
      if (together) region.parts = 1 + offered;
    }
    // A wake-up that got lost, as some versions of glibc lose a signal (its bug 25847), would leave
    // a team waiting for ever; a region of parts gets done without.
    if (together) return wake_.notify_all();
    for (int i = 0; i < offered; ++i) wake_.notify_one();
  }

  // Each offer is for one idle worker.
  int free_workers() const { return idle_ - static_cast<int>(offers_.size()); }

  void start_workers(int wanted) {
    const BlockedSignals blocked;
    while (free_workers() < wanted && workers_ < max_threads - 1) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::exception&) {
        return;  // no more threads to be had: the caller does the rest
      }
      ++workers_;
      ++idle_;
    }
  }

  // Takes back the offers that nobody has taken up, and waits for the parts that workers have
  // begun: mostly their tail, short beside the call, so it looks before it sleeps.
  void leave(Region& region) {
    std::unique_lock<std::mutex> lock(mutex_);
    offers_.erase(std::remove(offers_.begin(), offers_.end(), &region), offers_.end());
    const auto empty = [&] { return region.inside.load(std::memory_order_acquire) == 0; };
    if (empty()) return;
    lock.unlock();
    for (int i = 0; i < looks; ++i) {
      if (empty()) return;
      std::this_thread::yield();
    }
    lock.lock();
    left_.wait(lock, empty);
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
      const bool last = region->inside.fetch_sub(1, std::memory_order_acq_rel) == 1;
      // Counted out first, then locked: a caller that has looked and not yet gone to sleep holds
      // the lock, so the word reaches it.
      lock.lock();
      ++idle_;
      if (last) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;  // an offer
  std::condition_variable left_;  // a region without workers
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
  const char* text = std::getenv("FASTBPTT_NUM_THREADS");
  if (text && *text) {
    char* end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || n < 1 || n > max_threads) {
      throw std::invalid_argument("FASTBPTT_NUM_THREADS: got '" + std::string(text) +
                                  "', wanted a whole number from 1 to " +
                                  std::to_string(max_threads));
    }
    return static_cast<int>(n);
  }
  return usable_cpus();
}

std::atomic<int> threads{0};

thread_local int limit = 0;  // 0: none

}  // namespace

int usable_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    return std::clamp(CPU_COUNT(&set), 1, max_threads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, max_threads);
}

void run_parts(int parts, void (*part)(void*, int), void* context) {
  if (parts <= 0) return;
  if (parts == 1) return part(context, 0);
  Region region{part, context, parts};
  the_pool().run(region, false);
}

void run_team(int wanted, void (*body)(void*, int rank, int size), void* context) {
  struct Member {
    void (*body)(void*, int, int);
    void* context;
    Region* region;
  } member{body, context, nullptr};
  Region region{[](void* data, int rank) {
                  const Member& m = *static_cast<Member*>(data);
                  m.body(m.context, rank, m.region->parts);
                },
                &member, std::max(wanted, 1)};
  member.region = &region;
  if (wanted <= 1) return region.part(region.context, 0);
  the_pool().run(region, true);
}

void Barrier::wait(int size) {
  constexpr int spins = 4000;
  const unsigned phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int i = 0; phase_.load(std::memory_order_acquire) == phase; ++i) {
    if (i < spins)
      relax();
    else
      std::this_thread::yield();
  }
}

void set_num_threads(int n) {
  if (n < 1 || n > max_threads) {
    throw std::invalid_argument("n: got " + std::to_string(n) + ", wanted from 1 to " +
                                std::to_string(max_threads));
  }
  threads = n;
}

int get_num_threads() {
  if (limit != 0) return limit;
  int n = threads;
  if (n != 0) return n;
  const int standard = default_threads();
  // Unless another thread has set it by now.
  return threads.compare_exchange_strong(n, standard) ? standard : n;
}

ThreadLimit::ThreadLimit(int n) : before_(limit) { limit = std::clamp(n, 1, max_threads); }

ThreadLimit::~ThreadLimit() { limit = before_; }

}  // namespace fastbptt
