// Per layer: x -> norm -> projection -> rotary -> attention -> output, added to x and normed in one
// pass over memory -> in -> GELU -> out, whose sum with x is left to the next layer's norm.
//
// Kept for the pass back, per token and layer: x twice (float32), both norms' outputs, the
// projection, attention's output and the input of GELU. GELU's output is made again from its input.
//
// Query, key and value rows, score rows and zero rows up to a multiple of eight stand below each
// other in one matrix, `projection`. Forward, the heads and the scores are two products (the scores
// come out in float32); back, they are one.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/gpt_training_pass.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/ops/training_kernels.h"
#include "natslm/roles/assignment.h"

namespace natslm::models {
namespace {

using at::Tensor;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Bytes that the logits of the rows in work may take. Fewer rows would read and write the
// embedding's gradient more often (309 MB a time for GPT-2's), more would save nothing.
constexpr int64_t kLogitBytes = int64_t{512} << 20;

// Rows whose logits are in memory at once: equal parts of `rows`, in multiples of 128.
int64_t head_rows(int64_t rows, int64_t columns, int64_t element_bytes) {
  const int64_t most = std::max<int64_t>(kLogitBytes / (columns * element_bytes) / 128, 1) * 128;
  const int64_t parts = (rows + most - 1) / most;
  return round_up((rows + parts - 1) / parts, 128);
}

// x [n, k] times the transpose of w [m, k].
Tensor times(const Tensor& x, const Tensor& w) {
  return at::mm(x, w.t());
}

// The same with a float32 result whatever the type of x and w.
Tensor times_float(const Tensor& x, const Tensor& w) {
  return x.scalar_type() == at::kFloat ? times(x, w)
         : x.is_cpu()                  ? times(x.to(at::kFloat), w.to(at::kFloat))
                                       : at::mm(x, w.t(), at::kFloat);
}

// gradient [m, k] float = (accumulate: gradient +) transpose of dy [n, m] times x [n, k].
void product_into(Tensor gradient, const Tensor& dy, const Tensor& x, bool accumulate) {
  if (!x.is_cpu()) {
    if (accumulate) {
      at::addmm_out(gradient, gradient, dy.t(), x, at::kFloat);
    } else {
      at::mm_out(gradient, dy.t(), x, at::kFloat);
    }
    return;
  }
  const Tensor product = at::mm(dy.to(at::kFloat).t(), x.to(at::kFloat));
  if (accumulate) {
    gradient.add_(product);
  } else {
    gradient.copy_(product);
  }
}

struct LayerMatrices {
  Tensor projection, out, mlp_in, mlp_out;
};

// The matrices in one type: copies of the weights, or their gradients.
struct Matrices {
  Tensor embedding;  // [vocabulary rounded up to 64, width], zero rows at the end
  std::vector<LayerMatrices> layers;
};

// What one layer keeps for the pass back.
struct Kept {
  ops::Normed attention_norm, mlp_norm;
  Heads heads;  // views of the projection, the leaves of attention's recorded gradient
  Tensor logits, attended, price;
  Tensor attention_out;  // [N, Hq * D]
  Tensor hidden;         // [N, hidden] before GELU
};

class GptTrainingPass : public TrainingPass {
 public:
  GptTrainingPass(const Config& config, const GptWeights& weights, const Rotary& rotary,
                  const NamedTensors& parameters, at::ScalarType type)
      : c_(config), weights_(weights), rotary_(rotary), parameters_(parameters), type_(type) {
    const c10::Device device = weights.embedding.device();
    NATSLM_CHECK(type == at::kBFloat16 || (device.is_cpu() && type == at::kFloat),
                 "a training pass on ", device.str(), " cannot be of ", c10::toString(type),
                 "; use bfloat16");
    if (!device.is_cpu()) {
      NATSLM_CHECK(c_.width % 8 == 0 && c_.width <= 8192 && c_.hidden % 8 == 0,
                   "the GPU trains widths and hidden sizes that are multiples of 8, width up to "
                   "8192; this model has ",
                   c_.width, " and ", c_.hidden);
      NATSLM_CHECK(c_.head_dim == 64 || c_.head_dim == 128, "the GPU trains heads of 64 or 128 ",
                   "channels; this model's have ", c_.head_dim);
    }
    copies_ = make_matrices(type, [&](const Tensor& copy, const Tensor& weight) {
      copies_of_.push_back(copy);
      masters_.push_back(weight.detach());
    });
    load_weights();
  }

  void load_weights() override {
    const c10::NoGradGuard no_grad;
    at::_foreach_copy_(copies_of_, masters_);
  }

  const std::vector<Tensor>& gradients() override {
    if (gradients_.empty()) make_gradients();
    return gradients_;
  }

  PassOutput loss(const TrainingInput& input, const Tensor& targets) override {
    return run(input, targets, nullptr);
  }

  PassOutput loss_and_gradients(const TrainingInput& input, const Tensor& targets,
                                const PassGradients& want) override {
    gradients();
    return run(input, targets, &want);
  }

 private:
  bool dense() const { return c_.roles.set == roles::RoleSet::kDense; }
  int64_t head_columns() const { return (int64_t{c_.q_heads} + 2 * c_.kv_heads) * c_.head_dim; }
  int64_t score_columns() const { return dense() ? 0 : int64_t{roles::kRoles} * c_.kv_heads; }
  ops::NormOptions norm_options() const { return {.epsilon = c_.norm_epsilon}; }

  void make_gradients() {
    std::unordered_map<const c10::TensorImpl*, Tensor> by_weight;
    gradient_matrices_ =
        make_matrices(at::kFloat, [&](const Tensor& gradient, const Tensor& weight) {
          by_weight[weight.unsafeGetTensorImpl()] = gradient;
        });
    const auto vector = [&](const Tensor& weight) {
      return by_weight[weight.unsafeGetTensorImpl()] =
                 at::zeros({c_.width}, weight.options().requires_grad(false));
    };
    for (const GptWeights::Layer& layer : weights_.layers) {
      attention_norm_gradients_.push_back(vector(layer.attention_norm));
      mlp_norm_gradients_.push_back(vector(layer.mlp_norm));
    }
    final_norm_gradient_ = vector(weights_.final_norm);
    for (const auto& [name, parameter] : parameters_)
      gradients_.push_back(by_weight.at(parameter.unsafeGetTensorImpl()));
  }

  // Calls part(piece of a matrix, the weight it belongs to) for all of them.
  template <class Part>
  Matrices make_matrices(at::ScalarType type, const Part& part) const {
    const auto options = weights_.embedding.options().dtype(type).requires_grad(false);
    const auto matrix = [&](const Tensor& weight) {
      Tensor x = at::zeros(weight.sizes(), options);
      part(x, weight);
      return x;
    };
    Matrices m;
    m.embedding = at::zeros({round_up(c_.vocabulary, 64), c_.width}, options);
    part(m.embedding.narrow(0, 0, c_.vocabulary), weights_.embedding);
    for (const GptWeights::Layer& layer : weights_.layers) {
      LayerMatrices l;
      l.projection = at::zeros({round_up(head_columns() + score_columns(), 8), c_.width}, options);
      part(l.projection.narrow(0, 0, head_columns()), layer.attention.qkv);
      if (!dense())
        part(l.projection.narrow(0, head_columns(), score_columns()), layer.attention.roles);
      l.out = matrix(layer.attention.out);
      l.mlp_in = matrix(layer.mlp_in);
      l.mlp_out = matrix(layer.mlp_out);
      m.layers.push_back(std::move(l));
    }
    return m;
  }

  PassOutput run(const TrainingInput& input, const Tensor& targets, const PassGradients* want) {
    const c10::NoGradGuard no_grad;
    check(input, targets);
    batch_ = input.tokens.size(0);
    tokens_ = input.tokens.size(1);
    const bool learn_roles = want && want->scores && input.sample && input.learn_roles && !dense();
    std::vector<Kept> kept;
    std::vector<Tensor> shares;

    mark("embedding");
    // The residual stream is x + branch; adding them is left to the norm that reads the sum.
    Tensor x = at::embedding(weights_.embedding, input.tokens).view({-1, c_.width}), branch;
    for (int32_t i = 0; i < c_.layers; ++i) {
      Kept k;
      branch = forward(i, x, branch, input, want != nullptr, learn_roles, k, shares);
      x = k.mlp_norm.sum;
      if (want) kept.push_back(std::move(k));
    }
    mark("norms");
    const ops::Normed last = ops::norm(x, branch, weights_.final_norm, norm_options(), type_);
    x = branch = Tensor();

    PassOutput output;
    if (!shares.empty()) output.shares = at::stack(shares).mean({0, 1, 2}, false, at::kDouble);
    Tensor dlast;
    output.loss = head(last.y, targets.reshape({-1}), want, dlast);
    if (!want) return output;

    mark("norms");
    Tensor dx = at::empty_like(last.sum);
    Tensor dbranch =
        norm_backward(last, weights_.final_norm, dlast, {}, dx, *want, final_norm_gradient_);
    dlast = Tensor();
    for (int32_t i = c_.layers - 1; i >= 0; --i) {
      dbranch = backward(i, kept.back(), dx, dbranch, input, learn_roles, *want);
      kept.pop_back();
    }
    mark("embedding");
    if (want->weights) {
      const Tensor rows = dx.view({batch_, tokens_, c_.width});
      gradient_matrices_.embedding.narrow(0, 0, c_.vocabulary)
          .add_(at::embedding_dense_backward(rows, input.tokens, c_.vocabulary, -1, false));
    }
    mark("");
    return output;
  }

  void check(const TrainingInput& input, const Tensor& targets) const {
    NATSLM_CHECK(input.tokens.dim() == 2 && input.tokens.scalar_type() == at::kInt &&
                     targets.scalar_type() == at::kInt && targets.sizes() == input.tokens.sizes(),
                 "tokens and targets must be int32 [B, T], got ", input.tokens.sizes(), " and ",
                 targets.sizes());
    NATSLM_CHECK(input.tokens.size(1) <= c_.context, "a sequence of ", input.tokens.size(1),
                 " tokens is longer than the model's context of ", c_.context, " tokens");
    NATSLM_CHECK(!input.lengths, "a training pass takes whole rows only, no lengths");
  }

  // One layer; returns what its feed-forward part adds to the residual stream k.mlp_norm.sum.
  Tensor forward(int32_t i, const Tensor& x, const Tensor& branch, const TrainingInput& input,
                 bool record, bool learn_roles, Kept& k, std::vector<Tensor>& shares) const {
    const GptWeights::Layer& weights = weights_.layers[i];
    const LayerMatrices& m = copies_.layers[i];
    mark("norms");
    k.attention_norm = ops::norm(x, branch, weights.attention_norm, norm_options(), type_);
    mark("products");
    const Tensor fused = times(k.attention_norm.y, m.projection.narrow(0, 0, head_columns()))
                             .view({batch_, tokens_, head_columns()});
    if (!dense()) {
      mark("score layer");
      k.logits =
          times_float(k.attention_norm.y, m.projection.narrow(0, head_columns(), score_columns()))
              .view({batch_, tokens_, score_columns()});
    }
    mark("rotary");
    ops::rotate_heads_(fused, int64_t{c_.q_heads} + c_.kv_heads, rotary_.cos(), rotary_.sin());
    attend(i, fused, input, record, learn_roles, k, shares);
    k.attention_out = k.attended.detach().transpose(1, 2).reshape(
        {batch_ * tokens_, int64_t{c_.q_heads} * c_.head_dim});
    mark("products");
    const Tensor added = times(k.attention_out, m.out);
    mark("norms");
    k.mlp_norm = ops::norm(k.attention_norm.sum, added, weights.mlp_norm, norm_options(), type_);
    mark("products");
    k.hidden = times(k.mlp_norm.y, m.mlp_in);
    mark("GELU");
    const Tensor activated = ops::gelu(k.hidden);
    mark("products");
    return times(activated, m.mlp_out);
  }

  // Attention's own gradient is recorded, from these leaves on: its operators bring theirs.
  void attend(int32_t i, const Tensor& fused, const TrainingInput& input, bool record,
              bool learn_roles, Kept& k, std::vector<Tensor>& shares) const {
    const at::AutoGradMode mode(record);
    const auto part = [&](int64_t first, int64_t heads) {
      return fused.narrow(2, first * c_.head_dim, heads * c_.head_dim)
          .view({batch_, tokens_, heads, c_.head_dim})
          .transpose(1, 2)
          .detach()
          .requires_grad_(record);
    };
    k.heads.q = part(0, c_.q_heads);
    k.heads.k = part(c_.q_heads, c_.kv_heads);
    k.heads.v = part(int64_t{c_.q_heads} + c_.kv_heads, c_.kv_heads);
    if (dense()) {
      mark("attention");
      k.attended = dense_attention(k.heads, c_, input);
      return;
    }
    k.logits = k.logits.detach().requires_grad_(learn_roles);
    mark("roles and attention");
    const RoleAttention attention = role_attention(k.heads, k.logits, c_, i, input);
    k.attended = attention.out;
    k.price = attention.price;
    shares.push_back(attention.shares.detach());
  }

  // Loss of the rows y [N, width], and unless `want` is null the gradient of y in `dy` and that of
  // the embedding.
  Tensor head(const Tensor& y, const Tensor& targets, const PassGradients* want, Tensor& dy) {
    const int64_t n = y.size(0), columns = copies_.embedding.size(0);
    const int64_t rows = head_rows(n, columns, y.element_size());
    if (want) dy = at::empty_like(y);
    bool accumulate = want && want->accumulate;
    std::vector<Tensor> losses;
    for (int64_t first = 0; first < n; first += rows) {
      const int64_t count = std::min(rows, n - first);
      const Tensor part = y.narrow(0, first, count);
      mark("head products");
      const Tensor logits = times(part, copies_.embedding);
      mark("cross-entropy");
      losses.push_back(ops::cross_entropy_rows_(logits, targets.narrow(0, first, count),
                                                c_.vocabulary, want != nullptr,
                                                want ? want->loss_weight : 0));
      if (!want) continue;
      mark("head products");
      Tensor dpart = dy.narrow(0, first, count);
      at::mm_out(dpart, logits, copies_.embedding);
      if (want->weights) product_into(gradient_matrices_.embedding, logits, part, accumulate);
      accumulate = true;
    }
    return at::cat(losses).sum(at::kDouble);
  }

  Tensor norm_backward(const ops::Normed& norm, const Tensor& weight, const Tensor& dy,
                       const Tensor& dsum, const Tensor& dx, const PassGradients& want,
                       const Tensor& dweight) const {
    return ops::norm_backward(norm, weight.detach(), norm_options(), dy, dsum, dx,
                              want.weights ? dweight : Tensor(), want.accumulate);
  }

  // Pass back through one layer. dx [N, width] is the gradient of the residual stream after it and
  // becomes that before it; dbranch is the same in the type of the products, and so is the result.
  Tensor backward(int32_t i, Kept& k, const Tensor& dx, Tensor dbranch, const TrainingInput& input,
                  bool learn_roles, const PassGradients& want) {
    const GptWeights::Layer& weights = weights_.layers[i];
    const LayerMatrices &m = copies_.layers[i], &g = gradient_matrices_.layers[i];
    const auto weight_gradient = [&](const Tensor& gradient, const Tensor& dy, const Tensor& x) {
      if (want.weights) product_into(gradient, dy, x, want.accumulate);
    };
    mark("products");
    const Tensor dhidden = at::mm(dbranch, m.mlp_out);
    mark("GELU");
    const Tensor activated = ops::gelu_backward_(k.hidden, dhidden, want.weights);
    k.hidden = Tensor();
    mark("products");
    if (want.weights) weight_gradient(g.mlp_out, dbranch, activated);
    weight_gradient(g.mlp_in, dhidden, k.mlp_norm.y);
    const Tensor dmlp = at::mm(dhidden, m.mlp_in);
    mark("norms");
    dbranch =
        norm_backward(k.mlp_norm, weights.mlp_norm, dmlp, dx, dx, want, mlp_norm_gradients_[i]);
    k.mlp_norm = {};
    mark("products");
    weight_gradient(g.out, dbranch, k.attention_out);
    const Tensor dattended =
        at::mm(dbranch, m.out).view({batch_, tokens_, c_.q_heads, c_.head_dim}).transpose(1, 2);
    mark(learn_roles ? "attention and roles, back" : "attention, back");
    const auto [dheads, dlogits] = attend_backward(k, dattended, learn_roles, want);
    mark("rotary");
    const int64_t columns = learn_roles ? m.projection.size(0) : head_columns();
    // With the input of the scores cut off, their gradient goes to their weights alone.
    const bool through = learn_roles && !input.detach_scores;
    const Tensor dfused = ops::rotate_heads_backward(dheads.q, dheads.k, dheads.v, dlogits, columns,
                                                     rotary_.cos(), rotary_.sin())
                              .view({-1, columns});
    k.heads = {};
    mark("products");
    const Tensor& y = k.attention_norm.y;
    const auto projection_gradient = [&](int64_t first, int64_t rows) {
      product_into(g.projection.narrow(0, first, rows), dfused.narrow(1, first, rows), y,
                   want.accumulate);
    };
    if (want.weights && learn_roles) {
      projection_gradient(0, columns);
    } else if (want.weights) {
      projection_gradient(0, head_columns());
    } else if (learn_roles) {
      projection_gradient(head_columns(), score_columns());
    }
    const int64_t used = through ? columns : head_columns();
    const Tensor dy = at::mm(dfused.narrow(1, 0, used), m.projection.narrow(0, 0, used));
    mark("norms");
    return norm_backward(k.attention_norm, weights.attention_norm, dy, dx, dx, want,
                         attention_norm_gradients_[i]);
  }

  std::pair<Heads, Tensor> attend_backward(Kept& k, const Tensor& dattended, bool learn_roles,
                                           const PassGradients& want) const {
    torch::autograd::variable_list outputs = {k.attended}, gradients = {dattended},
                                   inputs = {k.heads.q, k.heads.k, k.heads.v};
    if (learn_roles) {
      inputs.push_back(k.logits);
      if (want.price_weight.defined()) {
        outputs.push_back(k.price);
        gradients.push_back(want.price_weight / static_cast<double>(c_.layers));
      }
    }
    const torch::autograd::variable_list d = torch::autograd::grad(outputs, inputs, gradients);
    k.attended = k.price = k.logits = Tensor();
    return {Heads{.q = d[0], .k = d[1], .v = d[2], .rest = {}},
            learn_roles ? d[3].contiguous() : Tensor()};
  }

  const Config& c_;
  const GptWeights& weights_;
  const Rotary& rotary_;
  const NamedTensors& parameters_;
  at::ScalarType type_;
  Matrices copies_, gradient_matrices_;
  std::vector<Tensor> copies_of_, masters_;  // pieces of copies_ and the weights they are copies of
  std::vector<Tensor> attention_norm_gradients_, mlp_norm_gradients_;
  Tensor final_norm_gradient_;
  std::vector<Tensor> gradients_;
  int64_t batch_ = 0, tokens_ = 0;  // of the pass that is running
};

}  // namespace

std::unique_ptr<TrainingPass> make_gpt_training_pass(const Config& config,
                                                     const GptWeights& weights,
                                                     const Rotary& rotary,
                                                     const NamedTensors& parameters,
                                                     at::ScalarType type) {
  return std::make_unique<GptTrainingPass>(config, weights, rotary, parameters, type);
}

}  // namespace natslm::models
