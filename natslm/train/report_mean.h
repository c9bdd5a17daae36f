// The line of a log from the steps since the last one: means of what they reported.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "natslm/train/trainer.h"

namespace natslm::train {

// What is no mean (step, lambda, rates) is the last step's.
class ReportMean {
 public:
  void add(const StepReport& r) {
    ++count_;
    sum_.loss += r.loss;
    sum_.gradient_norm += r.gradient_norm;
    sum_.kv_end += r.kv_end;
    sum_.sampled.pairs += r.sampled.pairs;
    sum_.sampled.kv_end += r.sampled.kv_end;
    sum_.sampled.kv_mean += r.sampled.kv_mean;
    last_ = r;
  }
  StepReport take() {
    StepReport mean = last_;
    const double n = static_cast<double>(std::max<int64_t>(count_, 1));
    mean.loss = sum_.loss / n;
    mean.gradient_norm = sum_.gradient_norm / n;
    mean.kv_end = sum_.kv_end / n;
    mean.sampled = {sum_.sampled.pairs / n, sum_.sampled.kv_end / n, sum_.sampled.kv_mean / n};
    *this = {};
    return mean;
  }

 private:
  int64_t count_ = 0;
  StepReport sum_{.sampled = {0, 0, 0}, .kv_end = 0};
  StepReport last_;
};

}  // namespace natslm::train
