// What bench attention times: attention of one workload by the operator and by LibTorch's dense
// kernels, as sides that run forward, backward or both.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "natslm/cli/bench.h"
#include "natslm/kernels/crossover.h"

namespace natslm::cli {

// A forward pass over inputs, and the backward pass from a gradient.
struct Side {
  std::string name;
  std::function<at::Tensor()> forward;
  std::vector<at::Tensor> inputs;
  at::Tensor grad, kept;  // kept: an output whose graph stays, for backward alone

  void run_forward() const;
  void run_both() const;
  void run_backward() const;
  void clear() const;  // the inputs' gradients
};

struct PassTimes {
  Timing forward, backward, both;  // the last two with `backward` only
};

struct SideTiming {
  bool backward = false;  // time the backward pass and both together, too
  bool graph = false;     // as launch graphs (GPU): what the host needs for a call does not count
  int32_t repeat = 7;
};

// Times all sides in turn, first checking once that what they compute is finite. With `graph` the
// current stream must not be the default one.
std::vector<PassTimes> time_sides(std::vector<Side>& sides, const SideTiming& timing,
                                  const c10::Device& device);

// Every key is visible and known to be.
bool every_key(const Workload& workload);

// Random tensors of a workload and what computes on them.
class AttentionProblem {
 public:
  AttentionProblem(const Workload& w, const c10::Device& device, bool backward);

  // The operator under these roles, with an order of the keys; `path` for both passes, or by the
  // crossover table. If every_key(): without lifetimes and role sums.
  Side ours(const std::string& name, const RandomRoles& roles,
            std::optional<kernels::AttentionPath> path, double density) const;
  // The path that the operator takes for a pass if none is given: "cpu" on the CPU.
  std::string path_name(kernels::Pass pass, double density) const;

  // From score logits that give these roles to lifetimes and the order of the keys: what a model
  // does before its attention.
  std::function<void()> lifetimes(const RandomRoles& drawn) const;

  // LibTorch's, restricted to the kernel of that name ("dense": any), with keys and values repeated
  // for the heads of a group beforehand or left to LibTorch: whichever is faster here. Nothing if
  // it cannot compute this.
  std::optional<Side> dense(const std::string& name) const;

 private:
  at::Tensor normal(int32_t heads) const;
  Side dense(const std::string& name, bool repeated) const;

  Workload work_;
  c10::Device device_;
  bool backward_;
  at::Tensor q_, k_, v_, grad_;
};

}  // namespace natslm::cli
