// How a long call is interrupted: the calling thread asks the caller's poll, all threads see the
// flag.
#pragma once
#include <atomic>
#include <thread>

#include "fastbptt/recurrent.h"

namespace fastbptt {

class StopFlag {
 public:
  explicit StopFlag(Interrupt interrupt) : interrupt_(interrupt) {}
  bool asked() {
    if (!interrupt_.poll) return false;
    if (std::this_thread::get_id() == caller_ && interrupt_.poll(interrupt_.data)) stop_ = true;
    return stop_.load(std::memory_order_relaxed);
  }
  bool is_set() const { return stop_.load(std::memory_order_relaxed); }
  void raise() const {
    if (stop_) throw Interrupted();
  }

 private:
  Interrupt interrupt_;
  std::thread::id caller_ = std::this_thread::get_id();
  std::atomic<bool> stop_{false};
};

}  // namespace fastbptt
