// AdamW (Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2) over
// named parameters, decay on matrices only, and what is done to gradients before it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/models/model.h"

namespace natslm::train {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;
  double decay = 0.1;  // of parameters with two or more axes; vectors have none
};

class AdamW {
 public:
  // A parameter's learning rate divided by that of step(), by its name; must be positive.
  using RateFactor = std::function<double(std::string_view name)>;

  // Keeps handles on the tensors; they must be leaves of type float on one device. Without
  // `rate_factor` all learn at the same rate.
  AdamW(const models::NamedTensors& parameters, const AdamWOptions& options,
        const RateFactor& rate_factor = {});

  // One update from the parameters' gradients, each divided by `gradient_divisor` first (which
  // changes the stored gradients too unless it is 1). A parameter without gradient is left alone,
  // its decay included.
  void step(double learning_rate, double gradient_divisor = 1);
  // The same with what changes from step to step in device memory, for a CUDA graph: 0-dim float
  // tensors beside the parameters. skip = 1: nothing but the count of steps changes. Never waits.
  void step_on_device(const at::Tensor& learning_rate, const at::Tensor& gradient_divisor,
                      const at::Tensor& skip);
  void zero_gradients();
  int64_t steps() const;

  // The state as named tensors that share its memory: mean.<name>, square.<name>; together with
  // steps() it is everything. Writing to them and set_steps() restores it.
  models::NamedTensors state() const;
  void set_steps(int64_t steps);

 private:
  struct Group {
    double decay = 0, rate_factor = 1;
    std::vector<at::Tensor> parameters, means, squares;
  };
  // A group's tensors that have a gradient.
  struct Active {
    std::vector<at::Tensor> parameters, gradients, means, squares, steps;
  };
  Active active(const Group& group) const;
  Group& group_of(double decay, double rate_factor);

  AdamWOptions options_;
  std::vector<Group> groups_;
  models::NamedTensors state_;
  at::Tensor steps_;  // 0-dim float beside the parameters, as LibTorch's kernel wants it: exact to
                      // 2^24
};

// Euclidean norm of all gradients together, in the order of the parameters.
double gradient_norm(const models::NamedTensors& parameters);

struct NonFinite {
  std::string name;          // of the parameter
  bool is_gradient = false;  // else its value
};
// The first parameter that holds a NaN or infinity, values before gradients.
std::optional<NonFinite> find_non_finite(const models::NamedTensors& parameters);

}  // namespace natslm::train
