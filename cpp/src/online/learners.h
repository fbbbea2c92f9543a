// The two kinds of learner: errors that go back through a window, influences that go forward.
#pragma once
#include <algorithm>

#include "fastbptt/buffer.h"
#include "fastbptt/online.h"

namespace fastbptt {

template <class S>
std::unique_ptr<OnlineLearner<S>> new_window(const OnlineShape& shape,
                                             const Weights<const S>* weights,
                                             const OnlineOptions& options);

template <class S>
std::unique_ptr<OnlineLearner<S>> new_forward_rule(const OnlineShape& shape,
                                                   const Weights<const S>* weights,
                                                   const OnlineOptions& options);

template <class T>
Buffer<T> zeroed(Index size) {
  Buffer<T> buffer(size);
  std::fill_n(buffer.data(), size, T(0));
  return buffer;
}

// Sizes are made in floating point first, where they cannot overflow.
inline void check_size(double elements) {
  if (elements > 1e17) throw std::bad_alloc();
}

}  // namespace fastbptt
