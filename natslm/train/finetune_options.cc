// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/finetune_options.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/train/options.h"

namespace natslm::train {
namespace {

// The settings of the authors' public code for frozen models (experiments/configs/
// finetune_distill.yaml and its trainer, read November 2026), as far as they carry over: error of
// the last hidden states on the answers of passkeys, roles for chunks of 32 tokens, window 256, a
// fixed price of 5e-7 for every sampled Global and Local. That price is not scaled by anything;
// method.md's lambda is about 2 * paper's / (layers * heads * length) times what it sums over, so
// the equivalent for one text depends on the model's size, and the value below is for SmolLM2's
// 30 layers of 3 heads at 2,048 tokens: 5e-7 * 30 * 3 * 2048 / 2.
FinetuneOptions published() {
  FinetuneOptions o;
  o.loss = kHiddenError;
  o.steps = 7000;
  o.batch = 1;
  o.window = 256;
  o.role_chunk = 32;
  o.learning_rate = 2e-3;
  o.final_share = 0.1;
  o.warm_up = 40;
  o.decay = 0.1;
  o.lambda = 0.046;
  o.bias_range = 0;
  o.price_slope = 0;
  return o;
}

const std::array kRecipes = {
    FinetuneRecipe{"nats-lm", "ours: cross-entropy over text, repetitions and facts, any budget",
                   FinetuneOptions{}, "mixed"},
    FinetuneRecipe{"published", "the method's authors': hidden states on passkeys, one budget",
                   published(), "passkeys"},
};

}  // namespace

void check(const FinetuneOptions& o) {
  const auto one_of = [](const char* name, const std::string& value, auto... allowed) {
    const std::vector<std::string_view> all{allowed...};
    NATSLM_CHECK(std::ranges::find(all, value) != all.end(), "--", name, " is ", value,
                 "; choose one of ", list(all));
  };
  one_of("method", o.method, kRolesMethod, kAdapterMethod);
  one_of("loss", o.loss, kCrossEntropy, kToDense, kBothLosses, kHiddenError);
  NATSLM_CHECK(o.method == kRolesMethod || o.loss == kCrossEntropy, "--loss is ", o.loss,
               "; an adapter that imitates the model it is added to learns nothing: leave it out");
  one_of("roles", o.roles, "gls", "gs", "gl");
  NATSLM_CHECK(o.window >= 0 && o.window <= 1 << 28, "--window is ", o.window,
               "; it must be from 0 to 268435456");
  NATSLM_CHECK(o.role_chunk >= 1 && o.role_chunk <= 1 << 20, "--role-chunk is ", o.role_chunk,
               "; it must be from 1 to 1048576");
  NATSLM_CHECK(o.price_slope >= 0 && o.price_slope * o.bias_range <= 20, "--price-slope is ",
               o.price_slope, "; it must be from 0 to 20 / --bias-range");
  NATSLM_CHECK(o.pairs >= 0 && o.pairs <= 1, "--pairs is ", o.pairs, "; it must be from 0 to 1");
  // The rest as in training from scratch.
  Options same;
  copy_fields(o, same, [](const char*) { return true; });
  check(same);
}

double default_pairs(const FinetuneOptions& o) {
  // Pairs within the window: every query reads the W tokens before it and itself.
  const double t = static_cast<double>(o.context);
  const double w = std::min<double>(static_cast<double>(o.window + o.role_chunk), t);
  const double floor = (w * t - w * (w - 1) / 2) / (t * (t + 1) / 2);
  // 0.24 at W = 64 and 2,048 tokens.
  return floor + 0.19 * (1 - floor);
}

roles::Options role_options(const FinetuneOptions& o) {
  if (o.method != kRolesMethod) return {.set = roles::RoleSet::kDense};
  return {.set = roles::role_set_from(o.roles),
          .window = static_cast<int32_t>(o.window),
          .chunk = static_cast<int32_t>(o.role_chunk)};
}

std::span<const FinetuneRecipe> finetune_recipes() {
  return kRecipes;
}

const FinetuneRecipe& finetune_recipe(std::string_view name) {
  std::vector<std::string_view> names;
  for (const FinetuneRecipe& recipe : kRecipes) {
    if (recipe.name == name) return recipe;
    names.push_back(recipe.name);
  }
  fail("the recipe '", name, "' is unknown; choose one of ", list(names));
}

}  // namespace natslm::train
