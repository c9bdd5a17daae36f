// nats-lm bench train --device cuda: whole steps with roles and without, in turn; then one pass of
// each taken apart by events, which says where the roles' time goes.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/cli/bench_train.h"
#include "natslm/cli/table.h"
#include "natslm/models/training_pass.h"
#include "natslm/train/device.h"
#include "natslm/train/device_steps.h"

namespace natslm::cli {

namespace {

const c10::Device kDevice(c10::kCUDA, 0);

data::TokenDataset random_text(const models::Config& config, int32_t batch, uint64_t seed) {
  std::vector<int32_t> tokens(static_cast<size_t>(8 * batch) * config.context + 1);
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(mix64(seed ^ mix64(i)) % config.vocabulary);
  return data::TokenDataset(std::move(tokens), config.vocabulary, seed);
}

train::Options options_of(const TrainBench& o, const models::Config& config) {
  train::Options options;
  options.steps = 1 << 30;
  options.batch = batch_of(o);
  options.micro_batch = o.micro_batch;
  options.context = config.context;
  options.learning_rate = 1e-5;  // the roles' shares stay those of the first weights and the bias
  options.kv_budget = 0;
  options.seed = o.seed;
  return options;
}

// One model and its steps.
class Arm {
 public:
  Arm(const models::Config& config, const TrainBench& o, const data::TokenDataset& text)
      : model_(models::make_model(config, o.seed)) {
    model_->to(kDevice);
    steps_ = train::make_device_steps(*model_, text, options_of(o, config),
                                      {.graph = o.graph, .bias = o.bias});
    run(5);  // the graph is recorded in these
    peak_ = steps_->peak_device_bytes();
  }

  // Milliseconds a step, the next one always queued before the last has finished.
  double run(int64_t steps) {
    const auto begin = std::chrono::steady_clock::now();
    const int64_t end = begun_ + steps;
    int64_t finished = begun_;
    while (finished < end) {
      while (begun_ < end && begun_ - finished <= steps_->ahead()) steps_->begin(begun_++);
      const train::FinishedStep done = steps_->finish();
      NATSLM_CHECK(!done.failed, "the loss of a random model is not finite");
      shares_ = done.report.sampled;
      ++finished;
    }
    const std::chrono::duration<double, std::milli> spent =
        std::chrono::steady_clock::now() - begin;
    return spent.count() / static_cast<double>(steps);
  }

  const models::Shares& shares() const { return shares_; }
  int64_t peak() const { return peak_; }

 private:
  std::unique_ptr<models::Model> model_;
  std::unique_ptr<train::Steps> steps_;
  int64_t begun_ = 0, peak_ = 0;
  models::Shares shares_;
};

// Milliseconds of each part of a pass, and the memory it takes.
struct PassParts {
  std::map<std::string, double> ms;
  int64_t peak = 0;
};

PassParts take_apart(const models::Config& config, const TrainBench& o, bool learn_roles) {
  const auto model = models::make_model(config, o.seed);
  model->to(kDevice);
  const auto pass = model->training_pass(at::kBFloat16);
  const int32_t rows = o.micro_batch > 0 ? o.micro_batch : batch_of(o);
  const auto device = at::TensorOptions().device(kDevice);
  const at::Tensor windows =
      at::randint(config.vocabulary, {rows, config.context + 1}, device.dtype(at::kInt));
  models::TrainingInput input;
  input.tokens = windows.slice(1, 0, config.context).contiguous();
  input.seed = o.seed;
  input.bias = o.bias;
  input.learn_roles = learn_roles;
  const at::Tensor targets = windows.slice(1, 1).contiguous();
  models::PassGradients want{.loss_weight = 1.0 / static_cast<double>(targets.numel())};
  want.price_weight = at::full({}, 0.1, device.dtype(at::kFloat));

  struct Mark {
    std::string part;
    c10::Event event;
  };
  std::vector<Mark> marks;
  const c10::impl::VirtualGuardImpl guard(kDevice.type());
  pass->set_marker([&](std::string_view part) {
    marks.push_back(
        {std::string(part), c10::Event(kDevice.type(), c10::EventFlag::BACKEND_DEFAULT)});
    marks.back().event.record(guard.getStream(kDevice));
  });
  PassParts parts;
  for (int32_t r = -2; r < o.repeat; ++r) {  // two to warm up
    marks.clear();
    train::reset_peak_device_bytes(kDevice);
    pass->loss_and_gradients(input, targets, want);
    marks.back().event.synchronize();
    if (r < 0) continue;
    parts.peak = train::peak_device_bytes(kDevice);
    for (size_t i = 0; i + 1 < marks.size(); ++i)
      parts.ms[marks[i].part] += marks[i].event.elapsedTime(marks[i + 1].event) / o.repeat;
  }
  return parts;
}

// Where the time of a pass with roles goes, beside one that draws roles but learns nothing of them
// (so without role sums and what follows from them) and a dense one. Launched kernel by kernel.
nlohmann::ordered_json print_parts(const models::Config& config, const TrainBench& o) {
  const PassParts dense = take_apart(without_roles(config), o, false),
                  drawn = take_apart(config, o, false), learned = take_apart(config, o, true);
  std::map<std::string, int> names;
  for (const PassParts* side : {&dense, &drawn, &learned})
    for (const auto& [name, ms] : side->ms) names[name];
  const auto of = [](const PassParts& side, const std::string& name) {
    const auto found = side.ms.find(name);
    return found == side.ms.end() ? 0.0 : found->second;
  };
  Table table({"part of a pass, ms", "dense", "roles drawn", "roles learned"});
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  double totals[3] = {};
  for (const auto& [name, ignored] : names) {
    const double ms[3] = {of(dense, name), of(drawn, name), of(learned, name)};
    for (int i = 0; i < 3; ++i) totals[i] += ms[i];
    table.add({name, fixed(ms[0], 3), fixed(ms[1], 3), fixed(ms[2], 3)});
    json[name] = {ms[0], ms[1], ms[2]};
  }
  table.add({"all", fixed(totals[0], 3), fixed(totals[1], 3), fixed(totals[2], 3)});
  table.add({"peak memory", bytes(dense.peak), bytes(drawn.peak), bytes(learned.peak)});
  json["peak_bytes"] = {dense.peak, drawn.peak, learned.peak};
  std::fputs(table.text().c_str(), stdout);
  return json;
}

}  // namespace

void bench_train_on_device(const TrainBench& o, Context& context) {
  train::prepare_cuda();
  const models::Config config = model_of(o);
  const int32_t batch = batch_of(o);
  const data::TokenDataset text = random_text(config, batch, o.seed);
  BenchResult result;
  result.baseline = "dense, LibTorch";
  models::Shares shares;
  int64_t peak = 0, dense_peak = 0;
  {
    // Alone, so that each one's peak is its own.
    dense_peak = Arm(without_roles(config), o, text).peak();
    Arm with_roles(config, o, text);
    peak = with_roles.peak();
    Arm dense(without_roles(config), o, text);
    constexpr int64_t kSteps = 10;  // of a measurement
    for (int32_t r = 0; r < o.repeat; ++r) {
      result.times.baseline.ms.push_back(dense.run(kSteps));
      result.times.ours.ms.push_back(with_roles.run(kSteps));
    }
    shares = with_roles.shares();
  }
  const nlohmann::ordered_json parts = print_parts(config, o);
  std::printf("peak memory of the tensors: %s with roles, %s dense\n", bytes(peak).c_str(),
              bytes(dense_peak).c_str());
  report_steps(context, config, batch, shares, result,
               {{"peak_device_bytes", peak},
                {"baseline_peak_device_bytes", dense_peak},
                {"parts_ms", parts}});
}

}  // namespace natslm::cli
