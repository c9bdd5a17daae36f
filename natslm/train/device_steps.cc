// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/device_steps.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Event.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <utility>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/models/training_pass.h"
#include "natslm/roles/assignment.h"
#include "natslm/train/device.h"
#include "natslm/train/device_budget.h"
#include "natslm/train/step_plan.h"

namespace natslm::train {
namespace {

using at::Tensor;
using Clock = std::chrono::steady_clock;

// Steps that run without a graph first: libraries choose their kernels and take their memory then,
// which must not happen while a graph is recorded.
constexpr int64_t kStepsBeforeGraph = 3;

// What a step is told.
struct StepInput {
  Tensor windows;    // [batch, context + 1] int32
  Tensor sequences;  // [batch] int64
  Tensor biases;     // [batch] float
  Tensor rate;       // 0-dim float
  Tensor step;       // 0-dim int64

  StepInput(const Options& o, const at::TensorOptions& where) {
    windows = at::empty({o.batch, o.context + 1}, where.dtype(at::kInt));
    sequences = at::empty({o.batch}, where.dtype(at::kLong));
    biases = at::empty({o.batch}, where.dtype(at::kFloat));
    rate = at::empty({}, where.dtype(at::kFloat));
    step = at::empty({}, where.dtype(at::kLong));
  }
  void copy_from(const StepInput& other) {
    windows.copy_(other.windows, /*non_blocking=*/true);
    sequences.copy_(other.sequences, true);
    biases.copy_(other.biases, true);
    rate.copy_(other.rate, true);
    step.copy_(other.step, true);
  }
};

// What a step tells, [kFirstNorm + parameters] double.
enum Statistic : int { kLoss, kNorm, kLambda, kPairs, kKvEnd, kKvMean, kArgmaxKvEnd, kFirstNorm };

at::TensorOptions pinned_if(bool gpu) {
  return at::TensorOptions().device(at::kCPU).pinned_memory(gpu);
}

// Half of the double buffer: everything of one step that the host touches.
struct Slot {
  Slot(const Options& o, c10::Device device, int64_t statistics)
      : host(o, pinned_if(!device.is_cpu())),
        staged(o, at::TensorOptions().device(device)),
        result(at::empty({statistics}, pinned_if(!device.is_cpu()).dtype(at::kDouble))) {}
  StepInput host;    // filled by the host
  StepInput staged;  // on the device, until the step before has read the one input of the graph
  Tensor result;     // read by the host
};

// Streams and events of a GPU.
struct Queue {
  explicit Queue(c10::Device device)
      : guard(device.type()),
        work(guard.getStreamFromGlobalPool(device, /*isHighPriority=*/false)),
        copies(guard.getStreamFromGlobalPool(device, false)) {
    for (int i = 0; i < 2; ++i) {
      sent.emplace_back(device.type());
      taken.emplace_back(device.type());
      done.emplace_back(device.type());
    }
  }
  c10::impl::VirtualGuardImpl guard;
  c10::Stream work, copies;
  // Of each slot: its input is on the device; the step has taken it; its result is on the host.
  std::vector<c10::Event> sent, taken, done;
};

class DeviceSteps : public Steps {
 public:
  DeviceSteps(models::Model& model, const data::TokenDataset& dataset, const Options& options,
              const DeviceStepOptions& how)
      : Steps(model, options),
        dataset_(dataset),
        device_(model.device()),
        graph_wanted_(how.graph && !device_.is_cpu()),
        bias_(how.bias),
        parts_(parts_of(options)),
        input_(options, at::TensorOptions().device(device_)),
        fixed_lambda_(at::full({}, dense() ? 0.0 : options.lambda,
                               at::TensorOptions().dtype(at::kDouble).device(device_))) {
    explain_out_of_memory([&] { pass_ = model.training_pass(how.products); });
    const auto& parameters = model.parameters();
    for (size_t i = 0; i < parameters.size(); ++i) {
      Tensor parameter = parameters[i].second;
      parameter.mutable_grad() = pass_->gradients()[i];
    }
    if (const auto b = budget()) control_.emplace(*b, device_);
    const int64_t statistics = kFirstNorm + static_cast<int64_t>(parameters.size());
    statistics_ = at::zeros({statistics}, fixed_lambda_.options());
    for (int i = 0; i < 2; ++i) slots_.emplace_back(options, device_, statistics);
    if (!device_.is_cpu()) {
      reset_peak_device_bytes(device_);
      queue_.emplace(device_);
    }
  }

  void begin(int64_t step) override {
    const auto now = Clock::now();
    running_.push_back({step, now});
    const size_t side = static_cast<size_t>(step % 2);
    Slot& slot = slots_[side];
    if (!queue_) {
      fill(step, slot.host);
      input_.copy_from(slot.host);
      launch();
      slot.result.copy_(statistics_);
      return;
    }
    // The copy of two steps ago must have left the host's memory before it is filled again. Its
    // step is finished, so this does not wait.
    queue_->sent[side].synchronize();
    fill(step, slot.host);
    explain_out_of_memory([&] {
      c10::Event before(device_.type());  // what the caller queued: resumed weights, validation
      before.record(queue_->guard.getStream(device_));
      before.block(queue_->work);
      {
        const c10::StreamGuard on(queue_->copies);
        queue_->taken[side].block(queue_->copies);
        slot.staged.copy_from(slot.host);
        queue_->sent[side].record(queue_->copies);
      }
      const c10::StreamGuard on(queue_->work);
      queue_->sent[side].block(queue_->work);
      input_.copy_from(slot.staged);
      queue_->taken[side].record(queue_->work);
      run();
      slot.result.copy_(statistics_, /*non_blocking=*/true);
      queue_->done[side].record(queue_->work);
    });
  }

  FinishedStep finish() override {
    const auto [step, began] = running_.front();
    running_.pop_front();
    const size_t side = static_cast<size_t>(step % 2);
    if (queue_) queue_->done[side].synchronize();
    const auto now = Clock::now();
    const double* x = slots_[side].result.const_data_ptr<double>();
    FinishedStep done;
    StepReport& r = done.report;
    r.step = step + 1;
    r.loss = x[kLoss];
    r.lambda = x[kLambda];
    r.learning_rate = learning_rate(step);
    r.gradient_norm = x[kNorm];
    r.sampled = {x[kPairs], x[kKvEnd], x[kKvMean]};
    r.kv_end = x[kArgmaxKvEnd];
    // A step that began while the one before ran takes the time from that one's end.
    done.seconds = std::chrono::duration<double>(now - std::max(began, last_end_)).count();
    last_end_ = now;
    r.tokens_per_s = static_cast<double>(options_.batch * options_.context) / done.seconds;
    done.failed = !std::isfinite(r.loss) || !std::isfinite(r.gradient_norm);
    if (done.failed) done.bad = first_not_finite(x);
    return done;
  }

  int64_t ahead() const override { return queue_ ? 1 : 0; }

  double lambda() const override {
    return (control_ ? control_->lambda() : fixed_lambda_).item<double>();
  }
  std::optional<roles::BudgetControl::State> control() const override {
    return control_ ? std::optional(control_->state()) : std::nullopt;
  }
  void restore_control(const roles::BudgetControl::State& state) override {
    if (control_) control_->restore(state);
  }
  int64_t peak_device_bytes() const override { return train::peak_device_bytes(device_); }

  ~DeviceSteps() override {
    try {
      if (queue_) queue_->work.synchronize();  // a step under way still uses what goes now
    } catch (...) {                            // of a device that is lost: nothing is under way
    }
  }

 private:
  void fill(int64_t step, StepInput& host) const {
    auto* windows = host.windows.mutable_data_ptr<int32_t>();
    auto* sequences = host.sequences.mutable_data_ptr<int64_t>();
    dataset_.fill_samples(step * options_.batch, options_.batch, options_.context, windows,
                          sequences);
    const auto [lowest, highest] = std::minmax_element(windows, windows + host.windows.numel());
    NATSLM_CHECK(*lowest >= 0 && *highest < model_.config().vocabulary, "token id ",
                 *lowest < 0 ? *lowest : *highest, " is outside the vocabulary of ",
                 model_.config().vocabulary, "; the text was packed with another tokenizer");
    for (int64_t i = 0; i < options_.batch; ++i)
      host.biases.mutable_data_ptr<float>()[i] =
          drawn_bias(options_.seed, step, sequences[i], options_.bias_range);
    *host.rate.mutable_data_ptr<float>() = static_cast<float>(learning_rate(step));
    *host.step.mutable_data_ptr<int64_t>() = step;
  }

  // Queues the step whose input is in input_.
  void run() {
    if (graph_) return graph_->replay();
    if (graph_wanted_ && launched_ >= kStepsBeforeGraph) {
      graph_ = record_launches([&] { launch(); });
      return graph_->replay();
    }
    launch();
    ++launched_;
  }

  // The whole step, in kernels that depend on nothing but device memory.
  void launch() {
    const c10::NoGradGuard no_grad;
    pass_->load_weights();
    const Tensor lambda = control_ ? control_->lambda() : fixed_lambda_;
    Tensor loss = at::zeros({}, lambda.options()),
           shares = dense() ? at::ones({roles::kShares}, lambda.options())
                            : at::zeros({roles::kShares}, lambda.options());
    for (const Part& part : parts_) {
      const models::PassOutput out = run_part(part, lambda);
      loss = loss + out.loss;
      if (out.shares.defined())
        shares = shares + out.shares * (static_cast<double>(part.count) /
                                        static_cast<double>(options_.batch));
    }
    loss = loss / static_cast<double>(options_.batch * options_.context);

    const Tensor norms = at::stack(at::_foreach_norm(pass_->gradients())).to(at::kDouble);
    const Tensor norm = norms.norm();
    const Tensor skip = (loss + norm).isfinite().logical_not().to(at::kFloat);
    const Tensor divisor = options_.clip > 0 ? (norm / options_.clip).clamp_min(1).to(at::kFloat)
                                             : at::ones({}, input_.rate.options());
    optimizer_.step_on_device(input_.rate, divisor, skip);

    // In the order of Statistic.
    const Tensor numbers = at::stack({loss, norm, lambda});
    statistics_.copy_(at::cat({numbers, shares, norms}));
    if (control_) control_->observe(shares[roles::kArgmaxKvEnd]);
  }

  models::PassOutput run_part(const Part& part, const Tensor& lambda) {
    const auto rows = [&](const Tensor& x) { return x.narrow(0, part.first, part.count); };
    models::TrainingInput input = role_input(0);
    input.device_step = input_.step;
    const Tensor windows = rows(input_.windows);
    input.tokens = windows.slice(1, 0, options_.context).contiguous();
    input.sequences = rows(input_.sequences);
    input.bias = bias_;
    if (options_.bias_range > 0) input.biases = rows(input_.biases);
    input.learn_roles = part.scores;
    models::PassGradients want{.loss_weight = part.loss_weight,
                               .weights = part.weights,
                               .scores = part.scores,
                               .accumulate = part.accumulate};
    if (!dense()) want.price_weight = (lambda * part.price_share).to(at::kFloat);
    return pass_->loss_and_gradients(input, windows.slice(1, 1).contiguous(), want);
  }

  std::optional<NonFinite> first_not_finite(const double* statistics) const {
    const auto& parameters = model_.parameters();
    for (const auto& [name, parameter] : parameters)
      if (!at::isfinite(parameter).all().item<bool>()) return NonFinite{name, false};
    // The gradients may be those of a later step by now, their lengths are not.
    for (size_t i = 0; i < parameters.size(); ++i)
      if (!std::isfinite(statistics[kFirstNorm + i])) return NonFinite{parameters[i].first, true};
    return std::nullopt;
  }

  template <class Work>
  void explain_out_of_memory(const Work& work) const {
    try {
      work();
    } catch (const c10::OutOfMemoryError&) {
      const int64_t micro = parts_.front().count;
      fail("the GPU's memory is too small for ", micro, " sequences of ", options_.context,
           " tokens at once; give a smaller --micro-batch",
           micro > 1 ? " (" + std::to_string(micro / 2) + ", say)" : std::string(),
           " or --context");
    }
  }

  struct Running {
    int64_t step;
    Clock::time_point began;
  };

  const data::TokenDataset& dataset_;
  c10::Device device_;
  bool graph_wanted_;
  float bias_;
  std::vector<Part> parts_;
  std::unique_ptr<models::TrainingPass> pass_;
  std::optional<DeviceBudget> control_;
  StepInput input_;      // what the graph reads
  Tensor fixed_lambda_;  // 0-dim double, without a control
  Tensor statistics_;    // what the graph writes
  std::vector<Slot> slots_;
  std::optional<Queue> queue_;  // absent on the CPU
  std::unique_ptr<LaunchGraph> graph_;
  int64_t launched_ = 0;  // steps without a graph
  std::deque<Running> running_;
  Clock::time_point last_end_;
};

}  // namespace

std::unique_ptr<Steps> make_device_steps(models::Model& model, const data::TokenDataset& dataset,
                                         const Options& options, const DeviceStepOptions& how) {
  return std::make_unique<DeviceSteps>(model, dataset, options, how);
}

}  // namespace natslm::train
