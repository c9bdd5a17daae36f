// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/attention_problem.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/one_hot.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <memory>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/cli/device.h"
#include "natslm/ops/attention.h"
#include "natslm/ops/library_attention.h"
#include "natslm/roles/assign_roles.h"
#include "natslm/train/device.h"

namespace natslm::cli {

namespace {

using kernels::AttentionPath;
using kernels::Pass;

constexpr int kGraphCalls = 10;  // recorded one after the other: starting a graph takes time, too

// Restricts LibTorch's attention to one of its kernels while it lives; "dense": any of them.
class OnlyKernel {
 public:
  explicit OnlyKernel(const std::string& name) : active_(name != "dense") {
    if (active_) set(name == "cudnn", name == "flash", name == "efficient", false);
  }
  ~OnlyKernel() {
    if (active_) set(true, true, true, true);
  }
  OnlyKernel(const OnlyKernel&) = delete;
  OnlyKernel& operator=(const OnlyKernel&) = delete;

 private:
  static void set(bool cudnn, bool flash, bool efficient, bool math) {
    at::Context& context = at::globalContext();
    context.setSDPUseCuDNN(cudnn);
    context.setSDPUseFlash(flash);
    context.setSDPUseMemEfficient(efficient);
    context.setSDPUseMath(math);
  }
  bool active_;
};

// Runs everything once and checks it; leaves the side ready for a backward pass alone.
void prepare(Side& side, bool backward) {
  const auto check = [&](const at::Tensor& x, const char* what) {
    NATSLM_CHECK(at::isfinite(x).all().item<bool>(), side.name, " computes ", what,
                 " that is not finite");
  };
  {
    const at::AutoGradMode off(false);
    check(side.forward(), "an output");
  }
  if (!backward) return;
  const at::AutoGradMode on(true);
  side.kept = side.forward();
  side.kept.backward(side.grad, /*retain_graph=*/true);
  for (const at::Tensor& x : side.inputs) check(x.grad(), "a gradient");
  side.clear();
}

}  // namespace

void Side::clear() const {
  for (const at::Tensor& x : inputs) x.mutable_grad() = at::Tensor();
}

void Side::run_forward() const {
  const at::AutoGradMode off(false);
  forward();
}

void Side::run_both() const {
  const at::AutoGradMode on(true);
  forward().backward(grad);
  clear();
}

void Side::run_backward() const {
  kept.backward(grad, /*retain_graph=*/true);
  clear();
}

std::vector<PassTimes> time_sides(std::vector<Side>& sides, const SideTiming& timing,
                                  const c10::Device& device) {
  std::vector<std::function<void()>> calls;
  for (Side& side : sides) {
    prepare(side, timing.backward);
    calls.push_back([&side] { side.run_forward(); });
    if (!timing.backward) continue;
    calls.push_back([&side] { side.run_backward(); });
    calls.push_back([&side] { side.run_both(); });
  }
  for (auto& call : calls) {
    if (!timing.graph) continue;
    const std::shared_ptr<train::LaunchGraph> graph = train::record_launches([&call] {
      for (int i = 0; i < kGraphCalls; ++i) call();
    });
    call = [graph] { graph->replay(); };
  }
  std::vector<Timing> times = time_in_turn(calls, timing.repeat, device);
  for (Timing& time : times) {
    for (double& ms : time.ms) ms /= timing.graph ? kGraphCalls : 1;
  }
  std::vector<PassTimes> result(sides.size());
  const size_t passes = timing.backward ? 3 : 1;
  for (size_t i = 0; i < sides.size(); ++i) {
    result[i].forward = times[i * passes];
    if (!timing.backward) continue;
    result[i].backward = times[i * passes + 1];
    result[i].both = times[i * passes + 2];
  }
  return result;
}

bool every_key(const Workload& w) {
  return w.global_share >= 1 && !w.uneven;
}

AttentionProblem::AttentionProblem(const Workload& w, const c10::Device& device, bool backward)
    : work_(w), device_(device), backward_(backward) {
  q_ = normal(w.heads);
  k_ = normal(w.kv_heads);
  v_ = normal(w.kv_heads);
  grad_ = at::randn_like(q_.detach());
}

at::Tensor AttentionProblem::normal(int32_t heads) const {
  return at::randn({work_.batch, heads, work_.tokens, work_.head_dim},
                   at::TensorOptions().dtype(scalar_type(work_)).device(device_))
      .requires_grad_(backward_);
}

Side AttentionProblem::ours(const std::string& name, const RandomRoles& roles,
                            std::optional<AttentionPath> path, double density) const {
  const Workload& w = work_;
  const auto shaped = [&](const at::Tensor& x, at::IntArrayRef sizes) {
    return x.view(sizes).to(device_);
  };
  const at::Tensor last =
      every_key(w) ? at::Tensor() : shaped(roles.last, {w.batch, w.kv_heads, w.tokens});
  ops::AttentionHints hints;
  hints.order = shaped(roles.order, {w.batch, w.kv_heads, w.tokens});
  hints.ends = shaped(roles.ends, {w.batch, w.kv_heads, kernels::KeyOrder::kSegments});
  hints.reach = roles.reach;
  hints.density = density;
  hints.forward_path = hints.backward_path = path;
  std::optional<ops::RoleInputs> role_inputs;
  std::vector<at::Tensor> inputs = {q_, k_, v_};
  if (backward_ && !every_key(w)) {
    role_inputs.emplace();
    role_inputs->horizons = shaped(roles.horizons, {3, w.batch, w.kv_heads, w.tokens});
    role_inputs->onehot =
        at::randn({w.batch, w.kv_heads, w.tokens, 3}, at::TensorOptions().device(device_))
            .requires_grad_(true);
    inputs.push_back(role_inputs->onehot);
  }
  const at::Tensor q = q_, k = k_, v = v_;
  return {name,
          [=] {
            return ops::attention(q, k, v, last, std::nullopt, std::nullopt, role_inputs, false,
                                  hints)
                .out;
          },
          inputs,
          grad_,
          {}};
}

std::string AttentionProblem::path_name(Pass pass, double density) const {
  const Workload& w = work_;
  if (!device_.is_cuda()) return "cpu";
  const at::AutoGradMode mode(pass == Pass::kBackward);
  if (every_key(w) && ops::library_serves(q_, k_, std::nullopt, {})) {
    return std::string(name(AttentionPath::kLibrary));
  }
  const auto chosen = [&]<class Params>(Params) {
    return kernels::choose_path(
        kernels::shape_only<Params>(w.batch, w.heads, w.kv_heads, w.tokens, w.head_dim, true),
        density);
  };
  const std::optional<AttentionPath> path = pass == Pass::kForward
                                                ? chosen(kernels::AttentionForward{})
                                                : chosen(kernels::AttentionBackward{});
  return path ? std::string(name(*path)) : "none";
}

std::function<void()> AttentionProblem::lifetimes(const RandomRoles& drawn) const {
  const Workload& w = work_;
  const at::Tensor chosen =
      drawn.roles.view({w.batch, w.kv_heads, w.tokens}).to(device_, at::kLong);
  const at::Tensor logits = at::one_hot(chosen, roles::kRoles)
                                .permute({0, 2, 1, 3})
                                .reshape({w.batch, w.tokens, roles::kRoles * w.kv_heads})
                                .to(scalar_type(w));
  const roles::Options options = {.set = roles::RoleSet::kGls, .window = w.window, .chunk = 1};
  return [=] {
    const at::AutoGradMode off(false);
    roles::assign_roles(logits, options);
  };
}

std::optional<Side> AttentionProblem::dense(const std::string& name) const {
  std::optional<Side> best;
  double best_ms = 0;
  for (const bool repeated : {true, false}) {
    if (!repeated && work_.heads == work_.kv_heads) continue;
    Side side = dense(name, repeated);
    const auto call = [&] { backward_ ? side.run_both() : side.run_forward(); };
    try {
      call();
      const double ms = milliseconds(device_, call, 3);
      if (best && best_ms <= ms) continue;
      best_ms = ms;
      best = std::move(side);
    } catch (const c10::Error&) {
      continue;  // this variant is not to be had
    }
  }
  return best;
}

Side AttentionProblem::dense(const std::string& name, bool repeated) const {
  const auto own = [&](const at::Tensor& x, int64_t times) {
    return x.detach().repeat_interleave(times, 1).contiguous().requires_grad_(backward_);
  };
  const int64_t times = repeated ? work_.heads / work_.kv_heads : 1;
  const at::Tensor q = own(q_, 1), k = own(k_, times), v = own(v_, times);
  const bool grouped = !repeated;
  return {name,
          [=] {
            const OnlyKernel only(name);
            return at::scaled_dot_product_attention(q, k, v, {}, 0.0, true, std::nullopt, grouped);
          },
          {q, k, v},
          grad_,
          {}};
}

}  // namespace natslm::cli
