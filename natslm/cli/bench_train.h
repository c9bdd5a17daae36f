// What the two ways of `nats-lm bench train` share: on the CPU (bench_train.cc) and on a GPU
// (bench_train_device.cc).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "natslm/cli/bench.h"
#include "natslm/models/models.h"

namespace natslm::cli {

struct TrainBench {
  std::string preset = "tiny";
  std::string roles = "gls";
  int32_t context = 0;
  int32_t batch = 0;
  int32_t micro_batch = 0;
  float bias = 2.0f;
  int32_t repeat = 7;
  uint64_t seed = 1;
  std::string device = "cpu";
  bool graph = true;
};

// The model with roles, and how many sequences a step takes.
models::Config model_of(const TrainBench& o);
int32_t batch_of(const TrainBench& o);

// The same model without roles.
models::Config without_roles(models::Config config);

void bench_train_on_device(const TrainBench& o, Context& context);

// What both ways report: times of steps with roles (ours) and without (baseline).
void report_steps(Context& context, const models::Config& config, int32_t batch,
                  const models::Shares& shares, BenchResult result, nlohmann::ordered_json more);

}  // namespace natslm::cli
