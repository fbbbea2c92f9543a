#include "online/learners.h"

namespace fastbptt {

template <class S>
std::unique_ptr<OnlineLearner<S>> new_online_learner(const OnlineShape& shape,
                                                     const Weights<const S>* weights,
                                                     const OnlineOptions& options) {
  return options.rule == Rule::truncated ? new_window(shape, weights, options)
                                         : new_forward_rule(shape, weights, options);
}

template std::unique_ptr<OnlineLearner<float>> new_online_learner(const OnlineShape&,
                                                                  const Weights<const float>*,
                                                                  const OnlineOptions&);
template std::unique_ptr<OnlineLearner<double>> new_online_learner(const OnlineShape&,
                                                                   const Weights<const double>*,
                                                                   const OnlineOptions&);

}  // namespace fastbptt
